//! Against the `h2` crate: the same bytes come back whatever the pieces they travel in.

use super::*;

fn payload(seed: u64, size: usize) -> Vec<u8> {
    (0..size).map(|at| (at as u64).wrapping_mul(0x9e37_79b9).wrapping_add(seed).to_le_bytes()[1]).collect()
}

fn sizes(seed: u64) -> impl Iterator<Item = usize> {
    let mut dice = Choppy::new((), seed.wrapping_mul(77) + 5, 1);
    std::iter::repeat_with(move || match dice.roll(4) {
        0 => dice.roll(4),
        1 => dice.roll(100),
        2 => dice.roll(20_000),
        _ => dice.roll(300_000),
    })
    .map(|size| usize::try_from(size).unwrap())
}

/// An echo by the `h2` crate.
async fn h2_server(io: TlsStream<DuplexStream>, tasks: TaskGroup, frame: u32) {
    let mut builder = h2::server::Builder::new();
    builder.initial_window_size(100_000).max_frame_size(frame);
    let mut connection = builder.handshake::<_, Bytes>(io).await.unwrap();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        assert_eq!(request.method(), http::Method::CONNECT);
        tasks.spawn(async move {
            let mut body = request.into_body();
            let mut send = respond.send_response(http::Response::new(()), false).unwrap();
            while let Some(Ok(bytes)) = body.data().await {
                let _ = body.flow_control().release_capacity(bytes.len());
                if h2_send(&mut send, bytes).await.is_err() {
                    return;
                }
            }
            let _ = send.send_data(Bytes::new(), true);
        });
    }
}

async fn h2_send(send: &mut h2::SendStream<Bytes>, mut bytes: Bytes) -> Result<(), h2::Error> {
    while !bytes.is_empty() {
        send.reserve_capacity(bytes.len());
        let room = match std::future::poll_fn(|cx| send.poll_capacity(cx)).await {
            Some(room) => room?,
            None => return Ok(()),
        };
        send.send_data(bytes.split_to(room.min(bytes.len())), false)?;
    }
    Ok(())
}

#[tokio::test]
async fn our_client_and_their_server() {
    for (seed, most, frame) in
        [(1, 40, 16_384), (2, 3_000, 1 << 20), (3, 100_000, 20_000), (4, 1 << 20, 16_384)]
    {
        let tasks = TaskGroup::new();
        let (near, far) = duplex(64 << 10);
        let (near, far) = tls(Choppy::new(near, seed, most), far).await;
        tasks.spawn(h2_server(far, tasks.clone(), frame));
        let (handle, connection) = client(near);
        let _ended = serve(&tasks, connection, |_| async { unreachable!() });
        let budget = if most < 1000 { 20_000 } else { 1_000_000 };
        let handle = &handle;
        let one = |n: u64| async move {
            let stream = handle.open(&connect_block()).await.unwrap();
            let head = std::future::poll_fn(|cx| stream.poll_answer(cx)).await.unwrap();
            assert_eq!(head.status, Some(200));
            if n % 7 == 6 {
                // Some are given up in the middle.
                let _ = send(&stream, &payload(n, 5000)).await;
                return;
            }
            let sent = payload(n, budget);
            let write = async {
                let mut rest = &sent[..];
                for size in sizes(seed * 100 + n) {
                    let (now, later) = rest.split_at(size.min(rest.len()));
                    send(&stream, now).await.unwrap();
                    rest = later;
                    if rest.is_empty() {
                        return stream.finish().unwrap();
                    }
                }
            };
            let read = async {
                let mut got = Vec::new();
                loop {
                    let bytes = data(&stream).await.unwrap();
                    if bytes.is_empty() {
                        return got;
                    }
                    got.extend_from_slice(&bytes);
                }
            };
            let ((), got) = tokio::join!(write, read);
            assert!(got == sent, "stream {n} of seed {seed}");
        };
        let all = futures_util::future::join_all((0..16).map(one));
        tokio::time::timeout(LONG, all).await.expect("no end");
        assert_eq!(tasks.panics(), 0);
    }
}

#[tokio::test]
async fn their_client_and_our_server() {
    for (seed, most, window) in
        [(1, 40, 65_535), (2, 3_000, 1000), (3, 100_000, 1 << 20), (4, 1 << 20, 65_535)]
    {
        let tasks = TaskGroup::new();
        let (near, far) = duplex(64 << 10);
        let (near, far) = tls(near, Choppy::new(far, seed, most)).await;
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(window).enable_push(false);
        let (request, connection) = builder.handshake::<_, Bytes>(near).await.unwrap();
        // It says nothing before it is driven.
        tasks.spawn(async move { drop(connection.await) });
        let ours = tokio::time::timeout(LONG, server(far)).await.unwrap().unwrap();
        let _ended = serve(&tasks, ours, echoing);
        let budget = if most < 1000 || window < 10_000 { 20_000 } else { 1_000_000 };
        let request = &request;
        let one = |n: u64| async move {
            let connect = http::Request::builder().method("CONNECT").uri("10.0.0.2:80").body(()).unwrap();
            let mut ready = request.clone().ready().await.unwrap();
            let (answer, mut write) = ready.send_request(connect, false).unwrap();
            let answer = answer.await.unwrap();
            assert_eq!(answer.status(), 200);
            let mut body = answer.into_body();
            if n % 7 == 6 {
                let _ = write.send_data(payload(n, 5000).into(), false);
                return write.send_reset(h2::Reason::CANCEL);
            }
            let sent = payload(n, budget);
            let send = async {
                let mut rest = Bytes::from(sent.clone());
                for size in sizes(seed * 100 + n) {
                    let now = rest.split_to(size.min(rest.len()));
                    h2_send(&mut write, now).await.unwrap();
                    if rest.is_empty() {
                        return write.send_data(Bytes::new(), true).unwrap();
                    }
                }
            };
            let read = async {
                let mut got = Vec::new();
                while let Some(bytes) = body.data().await {
                    let bytes = bytes.unwrap();
                    got.extend_from_slice(&bytes);
                    let _ = body.flow_control().release_capacity(bytes.len());
                }
                got
            };
            let ((), got) = tokio::join!(send, read);
            assert!(got == sent, "stream {n} of seed {seed}");
        };
        let all = futures_util::future::join_all((0..16).map(one));
        tokio::time::timeout(LONG, all).await.expect("no end");
        assert_eq!(tasks.panics(), 0);
    }
}

/// Their client sees our two steps, and its streams finish.
#[tokio::test]
async fn their_client_is_drained() {
    let tasks = TaskGroup::new();
    let (near, far) = duplex(64 << 10);
    let (near, far) = tls(near, far).await;
    let (request, connection) = h2::client::handshake(near).await.unwrap();
    let (sender, over) = tokio::sync::oneshot::channel();
    tasks.spawn(async move { drop(sender.send(connection.await)) });
    let mut ours = server(far).await.unwrap();
    let connect = http::Request::builder().method("CONNECT").uri("10.0.0.2:80").body(()).unwrap();
    let mut ready = request.clone().ready().await.unwrap();
    let (answer, mut write) = ready.send_request(connect, false).unwrap();
    let Event::Request(Request { stream, .. }) = ours.next().await else { panic!("no stream") };
    tasks.spawn(echoing(stream));
    ours.drain();
    let ended = serve(&tasks, ours, |_| async { panic!("a stream after the end") });
    let mut body = answer.await.unwrap().into_body();
    write.send_data(Bytes::from_static(b"last words"), true).unwrap();
    assert_eq!(body.data().await.unwrap().unwrap(), "last words");
    while let Some(end) = body.data().await {
        assert_eq!(end.unwrap(), "");
    }
    assert!(matches!(tokio::time::timeout(LONG, ended).await.unwrap().unwrap(), Cause::Closed));
    drop((ready, request));
    assert!(tokio::time::timeout(LONG, over).await.unwrap().unwrap().is_ok());
}
