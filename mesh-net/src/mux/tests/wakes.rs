//! Nothing waits for somebody who sleeps, and what is idle holds nothing.

use super::*;

/// Many writers and one narrow transport: whoever finds the writer away relies on whoever has it.
#[test]
fn no_wake_is_lost() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(async {
        for seed in 0..60 {
            let tasks = TaskGroup::new();
            // From narrower than a record to wider than all that may wait.
            let (near, far) = duplex([300, 5_000, 70_000, 1 << 20][usize::try_from(seed % 4).unwrap()]);
            let (near, far) = tls(Choppy::new(near, seed, 60_000), Choppy::new(far, seed + 99, 60_000)).await;
            let (handle, connection) = client(near);
            let ours = tokio::time::timeout(LONG, async {
                let _client = serve(&tasks, connection, |_| async { unreachable!() });
                server(far).await.unwrap()
            });
            let _server = serve(&tasks, ours.await.unwrap(), echoing);
            let (sender, mut done) = tokio::sync::mpsc::channel(64);
            let handle = Arc::new(handle);
            for n in 0..12u8 {
                let (handle, sender) = (handle.clone(), sender.clone());
                tasks.spawn(async move {
                    let stream = handle.open(&connect_block()).await.unwrap();
                    let bulk = n % 3 == 0;
                    for round in 0..if bulk { 2 } else { 40 } {
                        let sent = vec![n ^ round; if bulk { 150_000 } else { 1 + usize::from(round) }];
                        let write = send(&stream, &sent);
                        let read = async {
                            let mut left = sent.len();
                            while left > 0 {
                                let bytes = data(&stream).await.unwrap();
                                assert!(!bytes.is_empty() && bytes.iter().all(|byte| *byte == n ^ round));
                                left -= bytes.len();
                            }
                        };
                        tokio::join!(async { write.await.unwrap() }, read);
                    }
                    let _ = sender.send(()).await;
                });
            }
            drop(sender);
            let all = async {
                let mut count = 0;
                while done.recv().await.is_some() {
                    count += 1;
                }
                count
            };
            let count =
                tokio::time::timeout(LONG, all).await.unwrap_or_else(|_| panic!("stalled: seed {seed}"));
            assert_eq!((count, tasks.panics()), (12, 0), "seed {seed}");
        }
    });
}

/// Records that are sealed while somebody else is at the socket go out, and so do those that a full socket stopped.
#[tokio::test]
async fn what_is_sealed_while_the_writer_is_away_goes_out() {
    let (near, mut far) = duplex(1 << 20);
    let (near, server_end) = tls(near, &mut far).await;
    drop(server_end);
    let (handle, connection) = client(near);
    let shared = connection.shared.clone();
    let before = shared.out.lock().is_drained();
    assert!(before);
    let writer = shared.out.lock().take_writer().unwrap();
    // Everybody finds it away and leaves.
    let _first = handle.open(&connect_block()).await.unwrap();
    let mut pings = connection.pings();
    let asked =
        std::future::poll_fn(|cx| Poll::Ready(std::pin::pin!(pings.ping()).poll(cx).is_pending())).await;
    assert!(asked && !shared.out.lock().is_drained());
    // Who has it looks again when it comes back.
    shared.out.lock().put_back(writer);
    shared.pump();
    assert!(shared.out.lock().is_drained());
}

#[tokio::test]
async fn what_is_idle_holds_no_buffers() {
    let (mut raw, handle, _tasks, _ended) = Raw::server().await;
    let stream = handle.open(&connect_block()).await.unwrap();
    raw.until(|frame| matches!(frame, Frame::Headers { .. })).await;
    raw.frame(kind::HEADERS, flags::END_HEADERS, 1, &[0x88]).await;
    std::future::poll_fn(|cx| stream.poll_answer(cx)).await.unwrap();
    send(&stream, &[1; 20_000]).await.unwrap();
    raw.frame(kind::DATA, 0, 1, &[1; 10_000]).await;
    for _ in 0..3 {
        raw.settle().await;
    }
    assert_eq!(data(&stream).await.unwrap().len(), 10_000);
    raw.settle().await;
    raw.settle().await;
    let shared = handle.shared.clone();
    assert_eq!(shared.out.lock().capacity(), 0);
    assert!(size_of::<Core>() + size_of::<Stream>() <= 512, "{}", size_of::<Core>());
    assert!(size_of::<Connection>() <= 1024, "{}", size_of::<Connection>());
    assert!(size_of::<Shared>() <= 2048, "{}", size_of::<Shared>());
}

/// A few bytes go between those of streams that carry much; those of one that carries much itself stand in line.
#[tokio::test]
async fn a_few_bytes_do_not_wait_for_room_and_many_do() {
    let (near, far) = duplex(1 << 20);
    let (near, _far) = tls(near, far).await;
    let (handle, connection) = client(near);
    let shared = connection.shared.clone();
    shared.table.lock().window = 1 << 24;
    shared.out.lock().window = 1 << 24;
    let _writer = shared.out.lock().take_writer().unwrap();
    let bulk = handle.open(&connect_block()).await.unwrap();
    let other = handle.open(&connect_block()).await.unwrap();
    let some = vec![1; 64 << 10];
    let sent = |stream: &Stream, size: usize| {
        let cx = Context::from_waker(Waker::noop());
        match stream.poll_send(&cx, &some[..size]) {
            Poll::Ready(sent) => sent.unwrap(),
            Poll::Pending => 0,
        }
    };
    while sent(&bulk, 64 << 10) > 0 {}
    assert_eq!(sent(&other, 5_000), 0);
    assert_eq!(sent(&other, 100), 100);
    assert_eq!(sent(&other, 100), 0, "once for each visit to the socket");
}
