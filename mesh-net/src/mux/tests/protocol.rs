//! What RFC 9113 wants of frames that are odd, wrong or in the wrong place.

use super::*;

fn ends_with(reason: Reason) -> impl Fn(&Cause) -> bool {
    move |cause| matches!(cause, Cause::Broken(broken) if broken.reason == reason)
}

/// A connection that hears `bytes` after its greeting ends with GOAWAY and `reason`.
async fn check(what: &str, bytes: Vec<u8>, reason: Reason) {
    let (mut raw, tasks, ended) = Raw::client(echoing).await;
    raw.write(&bytes).await;
    assert_eq!(raw.goes_away().await.1, reason, "{what}");
    let cause = tokio::time::timeout(LONG, ended).await.unwrap().unwrap();
    assert!(ends_with(reason)(&cause), "{what}: {cause}");
    assert_eq!(tasks.panics(), 0);
}

#[tokio::test]
async fn errors_of_the_connection_have_their_codes() {
    use Reason as R;
    let setting = |id: u16, value: u32| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
    let headers = |flags, stream, block: &[u8]| framed(kind::HEADERS, flags, stream, block);
    let block = connect_block();
    let whole = flags::END_HEADERS;
    let opened = |then: Vec<u8>| [headers(whole, 1, &block), then].concat();
    let cases = [
        ("DATA on 0", framed(kind::DATA, 0, 0, b"x"), R::PROTOCOL_ERROR),
        ("DATA on an idle stream", framed(kind::DATA, 0, 5, b"x"), R::PROTOCOL_ERROR),
        (
            "padding longer than DATA",
            opened(framed(kind::DATA, flags::PADDED, 1, &[5, 1, 2])),
            R::PROTOCOL_ERROR,
        ),
        (
            "DATA too short for padding",
            opened(framed(kind::DATA, flags::PADDED, 1, &[])),
            R::FRAME_SIZE_ERROR,
        ),
        ("HEADERS on 0", headers(whole, 0, &block), R::PROTOCOL_ERROR),
        ("an even stream", headers(whole, 2, &block), R::PROTOCOL_ERROR),
        ("headers that mean nothing", headers(whole, 1, &[0x80]), R::COMPRESSION_ERROR),
        ("CONTINUATION of nothing", framed(kind::CONTINUATION, whole, 1, &block), R::PROTOCOL_ERROR),
        (
            "PING inside headers",
            [headers(0, 1, &block), framed(kind::PING, 0, 0, &[0; 8])].concat(),
            R::PROTOCOL_ERROR,
        ),
        (
            "CONTINUATION of another stream",
            [headers(0, 1, &block), framed(kind::CONTINUATION, whole, 3, &block)].concat(),
            R::PROTOCOL_ERROR,
        ),
        ("RST_STREAM on 0", framed(kind::RST_STREAM, 0, 0, &[0; 4]), R::PROTOCOL_ERROR),
        ("RST_STREAM on an idle stream", framed(kind::RST_STREAM, 0, 1, &[0; 4]), R::PROTOCOL_ERROR),
        ("a long RST_STREAM", opened(framed(kind::RST_STREAM, 0, 1, &[0; 5])), R::FRAME_SIZE_ERROR),
        ("SETTINGS on a stream", framed(kind::SETTINGS, 0, 1, &[]), R::PROTOCOL_ERROR),
        ("half a setting", framed(kind::SETTINGS, 0, 0, &[0; 5]), R::FRAME_SIZE_ERROR),
        ("ACK with settings", framed(kind::SETTINGS, flags::ACK, 0, &[0; 6]), R::FRAME_SIZE_ERROR),
        ("ENABLE_PUSH 2", framed(kind::SETTINGS, 0, 0, &setting(2, 2)), R::PROTOCOL_ERROR),
        ("a window of 2^31", framed(kind::SETTINGS, 0, 0, &setting(4, 1 << 31)), R::FLOW_CONTROL_ERROR),
        ("frames of 1 byte", framed(kind::SETTINGS, 0, 0, &setting(5, 1)), R::PROTOCOL_ERROR),
        ("PUSH_PROMISE", opened(framed(kind::PUSH_PROMISE, whole, 1, &[0; 4])), R::PROTOCOL_ERROR),
        ("PING on a stream", framed(kind::PING, 0, 1, &[0; 8]), R::PROTOCOL_ERROR),
        ("a short PING", framed(kind::PING, 0, 0, &[0; 7]), R::FRAME_SIZE_ERROR),
        ("GOAWAY on a stream", framed(kind::GOAWAY, 0, 1, &[0; 8]), R::PROTOCOL_ERROR),
        ("a short GOAWAY", framed(kind::GOAWAY, 0, 0, &[0; 7]), R::FRAME_SIZE_ERROR),
        ("WINDOW_UPDATE by 0", framed(kind::WINDOW_UPDATE, 0, 0, &[0; 4]), R::PROTOCOL_ERROR),
        ("a short WINDOW_UPDATE", framed(kind::WINDOW_UPDATE, 0, 0, &[0; 3]), R::FRAME_SIZE_ERROR),
        (
            "a window beyond 2^31-1",
            framed(kind::WINDOW_UPDATE, 0, 0, &frame::LARGEST.to_be_bytes()),
            R::FLOW_CONTROL_ERROR,
        ),
        ("a frame longer than we take", vec![0x10, 0, 1, 0, 0, 0, 0, 0, 1], R::FRAME_SIZE_ERROR),
    ];
    for (what, bytes, reason) in cases {
        check(what, bytes, reason).await;
    }
}

#[tokio::test]
async fn what_does_not_begin_with_preface_and_settings_is_refused() {
    for bytes in [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        [frame::PREFACE, &framed(kind::PING, 0, 0, &[0; 8])].concat(),
        [frame::PREFACE, &framed(kind::SETTINGS, flags::ACK, 0, &[])].concat(),
    ] {
        let (near, far) = duplex(1 << 20);
        let (mut near, far) = tls(near, far).await;
        near.write_all(&bytes).await.unwrap();
        let cause = server(far).await.map(drop).unwrap_err();
        assert!(ends_with(Reason::PROTOCOL_ERROR)(&cause), "{cause}");
    }
}

/// Only the stream is reset; the connection goes on.
#[tokio::test]
async fn errors_of_a_stream_leave_the_others_alone() {
    let (mut raw, tasks, _ended) = Raw::client(echoing).await;
    let request = |headers: &[(&[u8], &[u8])]| {
        headers.iter().fold(Encoder::default(), |block, (name, value)| block.literal(name, value)).finish()
    };
    let method = (&b":method"[..], &b"CONNECT"[..]);
    let authority = (&b":authority"[..], &b"10.0.0.2:80"[..]);
    let bad: Vec<Vec<u8>> = vec![
        request(&[method]),
        request(&[authority]),
        request(&[method, method, authority]),
        request(&[method, authority, (b":path", b"/")]),
        request(&[method, authority, (b":scheme", b"https")]),
        request(&[method, authority, (b":status", b"200")]),
        request(&[method, authority, (b":what", b"x")]),
        request(&[method, (b"a", b"b"), authority]),
        request(&[method, authority, (b"Upper", b"x")]),
        request(&[method, authority, (b"", b"x")]),
        request(&[method, authority, (b"a b", b"x")]),
        request(&[method, authority, (b"a", b"x\r\ny")]),
        request(&[method, authority, (b"a", b"x\0y")]),
        request(&[method, authority, (b"connection", b"close")]),
        request(&[method, authority, (b"transfer-encoding", b"chunked")]),
        request(&[method, authority, (b"te", b"gzip")]),
        request(&[(b":method", b"GET"), authority]),
    ];
    let mut stream = 1;
    for block in bad {
        raw.frame(kind::HEADERS, flags::END_HEADERS, stream, &block).await;
        let over = |frame: &Frame| matches!(frame, Frame::Reset { .. } | Frame::Headers { .. });
        let frame = raw.until(over).await;
        assert!(is_reset(stream, Reason::PROTOCOL_ERROR)(&frame), "{block:?}: {frame:?}");
        stream += 2;
    }
    // A frame of a wrong size that says nothing about the others, a window that bursts, an update by nothing.
    let cases: [(u8, &[u8], Reason); 3] = [
        (kind::PRIORITY, &[0; 4], Reason::FRAME_SIZE_ERROR),
        (kind::WINDOW_UPDATE, &[0x7f, 0xff, 0xff, 0xff], Reason::FLOW_CONTROL_ERROR),
        (kind::WINDOW_UPDATE, &[0; 4], Reason::PROTOCOL_ERROR),
    ];
    for (kind, payload, reason) in cases {
        raw.connect(stream, false).await;
        raw.until(|frame| matches!(frame, Frame::Headers { .. })).await;
        raw.frame(kind, 0, stream, payload).await;
        raw.until(is_reset(stream, reason)).await;
        stream += 2;
    }
    // Bytes after the end of the stream.
    raw.connect(stream, true).await;
    raw.until(|frame| matches!(frame, Frame::Headers { .. })).await;
    raw.frame(kind::DATA, 0, stream, b"late").await;
    raw.until(is_reset(stream, Reason::STREAM_CLOSED)).await;
    raw.settle().await;
    assert_eq!(tasks.panics(), 0);
}

#[tokio::test]
async fn what_is_odd_but_right_is_understood() {
    let (mut raw, _tasks, _ended) = Raw::client(echoing).await;
    // Padded and with a priority, in three pieces.
    let block = connect_block();
    let (first, rest) = block.split_at(3);
    let (second, third) = rest.split_at(1);
    let padded = [&[4, 0, 0, 0, 0, 16], first, &[0; 4]].concat();
    raw.frame(kind::HEADERS, flags::PADDED | flags::PRIORITY, 1, &padded).await;
    raw.frame(kind::CONTINUATION, 0, 1, second).await;
    raw.frame(kind::CONTINUATION, flags::END_HEADERS, 1, third).await;
    raw.until(|frame| matches!(frame, Frame::Headers { stream: 1, end: false, .. })).await;
    raw.frame(kind::PRIORITY, 0, 9, &[0; 5]).await;
    raw.frame(0xfa, 0xff, 1, &[7; 3000]).await;
    raw.frame(kind::GOAWAY, 0, 0, &[0; 40]).await;
    raw.frame(kind::DATA, flags::PADDED, 1, &[2, b'h', b'i', 0, 0]).await;
    let frame = raw.until(|frame| matches!(frame, Frame::Data(_))).await;
    assert!(matches!(&frame, Frame::Data(data) if data.payload == "hi"), "{frame:?}");
    raw.frame(kind::PING, 0, 0, b"are you?").await;
    raw.until(|frame| *frame == Frame::Pong(*b"are you?")).await;
    // Trailers end the stream, whatever they say.
    let trailers = Encoder::default().literal(b"a", b"b").finish();
    raw.frame(kind::HEADERS, flags::END_HEADERS | flags::END_STREAM, 1, &trailers).await;
    raw.until(|frame| matches!(frame, Frame::Data(data) if data.end)).await;
}

#[tokio::test]
async fn trailers_that_do_not_end_are_an_error_of_the_stream() {
    let (mut raw, _tasks, _ended) = Raw::client(echoing).await;
    raw.connect(1, false).await;
    let trailers = Encoder::default().literal(b"a", b"b").finish();
    raw.frame(kind::HEADERS, flags::END_HEADERS, 1, &trailers).await;
    raw.until(is_reset(1, Reason::PROTOCOL_ERROR)).await;
}

/// GOAWAY that permits all, a PING, and the real GOAWAY: a stream that was under way is served.
#[tokio::test]
async fn leaving_takes_two_steps() {
    let (near, far) = duplex(1 << 20);
    let (near, far) = tls(near, far).await;
    let mut raw = Raw::new(near, Parser::of_server());
    let mut greeting = frame::PREFACE.to_vec();
    Settings::default().write(&mut greeting);
    raw.write(&greeting).await;
    let connection = server(far).await.unwrap();
    raw.greeted().await;
    connection.drain();
    connection.drain();
    let tasks = TaskGroup::new();
    let ended = serve(&tasks, connection, echoing);
    assert_eq!(raw.read().await, Some(Frame::GoAway { last: frame::LARGEST, reason: Reason::NO_ERROR }));
    let Some(Frame::Ping(payload)) = raw.read().await else { panic!("no PING") };
    raw.connect(1, false).await;
    raw.frame(kind::PING, flags::ACK, 0, &payload).await;
    let last = raw.until(|frame| matches!(frame, Frame::GoAway { .. })).await;
    assert_eq!(last, Frame::GoAway { last: 1, reason: Reason::NO_ERROR });
    // Too late; and it is no error.
    raw.connect(3, false).await;
    raw.frame(kind::DATA, 0, 3, b"nobody reads this").await;
    raw.frame(kind::DATA, flags::END_STREAM, 1, b"last words").await;
    let frame = raw.until(|frame| matches!(frame, Frame::Data(data) if !data.payload.is_empty())).await;
    assert!(matches!(&frame, Frame::Data(data) if data.stream == 1 && data.payload == "last words"));
    while let Some(frame) = raw.read().await {
        assert!(matches!(&frame, Frame::Data(data) if data.stream == 1), "{frame:?}");
    }
    assert!(matches!(tokio::time::timeout(LONG, ended).await.unwrap().unwrap(), Cause::Closed));
}

#[tokio::test]
async fn a_client_leaves_a_server_that_goes_away() {
    let (mut raw, handle, _tasks, ended) = Raw::server().await;
    let block = connect_block();
    let (first, second) = (handle.open(&block).await.unwrap(), handle.open(&block).await.unwrap());
    raw.until(|frame| matches!(frame, Frame::Headers { stream: 3, .. })).await;
    raw.frame(kind::GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0]).await;
    let answer = std::future::poll_fn(|cx| second.poll_answer(cx)).await;
    assert!(matches!(answer, Err(Failure::GoAway)), "{answer:?}");
    assert!(matches!(handle.open(&block).await, Err(Failure::GoAway)));
    // The first one goes on, through a word in between.
    raw.frame(kind::HEADERS, flags::END_HEADERS, 1, &Encoder::default().named(8, b"103").finish()).await;
    raw.frame(kind::HEADERS, flags::END_HEADERS, 1, &[0x88]).await;
    assert_eq!(std::future::poll_fn(|cx| first.poll_answer(cx)).await.unwrap().status, Some(200));
    raw.frame(kind::DATA, flags::END_STREAM, 1, b"bye").await;
    assert_eq!(data(&first).await.unwrap(), "bye");
    assert_eq!(data(&first).await.unwrap(), "");
    first.finish().unwrap();
    assert!(matches!(tokio::time::timeout(LONG, ended).await.unwrap().unwrap(), Cause::Closed));
}

#[tokio::test]
async fn a_connection_without_users_says_goodbye() {
    let (mut raw, handle, _tasks, ended) = Raw::server().await;
    let stream = handle.open(&connect_block()).await.unwrap();
    drop(handle);
    raw.until(|frame| matches!(frame, Frame::Headers { stream: 1, .. })).await;
    drop(stream);
    raw.until(is_reset(1, Reason::CANCEL)).await;
    assert_eq!(raw.goes_away().await, (0, Reason::NO_ERROR));
    assert!(matches!(tokio::time::timeout(LONG, ended).await.unwrap().unwrap(), Cause::Closed));
}

#[tokio::test]
async fn a_server_without_push_and_odd_streams_is_held_to_it() {
    for bytes in [
        framed(kind::SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 1]),
        framed(kind::HEADERS, flags::END_HEADERS, 2, &[0x88]),
        framed(kind::HEADERS, flags::END_HEADERS, 1, &[0x88]),
        framed(kind::PUSH_PROMISE, flags::END_HEADERS, 1, &[0, 0, 0, 2, 0x88]),
    ] {
        let (mut raw, _handle, _tasks, ended) = Raw::server().await;
        raw.write(&bytes).await;
        assert_eq!(raw.goes_away().await.1, Reason::PROTOCOL_ERROR);
        assert!(ends_with(Reason::PROTOCOL_ERROR)(&ended.await.unwrap()));
    }
}
