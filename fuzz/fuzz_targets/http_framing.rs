//! Heads and chunked bodies as the waypoint follows them before its HTTP library does.

use mesh_waypoint::http::framing::{Body, Chunk, find_head_end, read_head};

pub const TARGET: crate::Target = crate::Target {
    name: "http_framing",
    seeds,
    dictionary: &[
        b"\r\n",
        b"\n",
        b"\r\n\r\n",
        b"Host: a\r\n",
        b"Content-Length: ",
        b"Transfer-Encoding: chunked\r\n",
        b" HTTP/1.1",
        b"0\r\n\r\n",
        b";",
        b": ",
        b"ffffffffffffffff",
    ],
    run,
};

fn seeds() -> Vec<Vec<u8>> {
    [
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST /x?y HTTP/1.1\r\nHost: a:80\r\nContent-Length: 5\r\n\r\nhello",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nt: 1\r\n\r\n",
        "5\r\nhello\r\nA\r\n0123456789\r\n0\r\n\r\n",
    ]
    .map(|seed| seed.as_bytes().to_vec())
    .into()
}

fn run(data: &[u8]) {
    if let Some(end) = find_head_end(data) {
        assert!(end <= data.len());
        if let Ok(head) = read_head(&data[..end]) {
            let text = data[..end].to_ascii_lowercase();
            let has = |name: &[u8]| text.windows(name.len()).any(|window| window == name);
            if matches!(head.body, Some(Body::Chunked(_))) {
                assert!(has(b"\r\ntransfer-encoding:") && !has(b"\r\ncontent-length:"));
            }
        }
    }
    // However a body is cut, it ends at the same place.
    let end = |step: usize| {
        let mut body = Body::Chunked(Chunk::Size(0, 0));
        let mut at = 0;
        for piece in data.chunks(step) {
            match body.take(piece) {
                Ok(taken) if taken.finished => return Ok(Some(at + taken.bytes)),
                Ok(taken) => at += taken.bytes,
                Err(_) => return Err(()),
            }
        }
        Ok(None)
    };
    assert_eq!(end(1), end(data.len().max(1)));
}
