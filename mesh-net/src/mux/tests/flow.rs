//! Windows both ways.

use super::*;

/// A server that sends `size` bytes on each stream and holds on to it.
fn sender(size: usize) -> impl Fn(Stream) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    move |stream| {
        Box::pin(async move {
            stream.answer(&[0x88], false).unwrap();
            let _ = send(&stream, &vec![7; size]).await;
            let _ = data(&stream).await;
        })
    }
}

/// Bytes that come on `stream` before everything has settled, and the longest frame.
async fn arrived(raw: &mut Raw, stream: u32) -> (usize, u32) {
    let (mut total, mut longest) = (0, 0);
    // What was sealed before the PING was answered is there; what a task was woken for comes before the second.
    for round in 0..3u8 {
        tokio::task::yield_now().await;
        let payload = [b'r', b'o', b'u', b'n', b'd', 0, 0, round];
        raw.frame(kind::PING, 0, 0, &payload).await;
        loop {
            match raw.read().await.unwrap() {
                Frame::Pong(got) if got == payload => break,
                Frame::Data(data) if data.stream == stream => {
                    total += data.payload.len();
                    longest = longest.max(data.charge.map_or(0, |(size, _)| size));
                }
                _ => {}
            }
        }
    }
    (total, longest)
}

fn setting(id: u8, value: u32) -> Vec<u8> {
    framed(kind::SETTINGS, 0, 0, &[&[0, id][..], &value.to_be_bytes()].concat())
}

fn update(stream: u32, by: u32) -> Vec<u8> {
    framed(kind::WINDOW_UPDATE, 0, stream, &by.to_be_bytes())
}

#[tokio::test]
async fn a_sender_keeps_to_both_windows_and_the_frame_size() {
    let (mut raw, _tasks, _ended) = Raw::client(sender(300_000)).await;
    raw.connect(1, false).await;
    // Both windows are the default.
    assert_eq!(arrived(&mut raw, 1).await, (65_535, 16_375));
    raw.write(&update(1, 100_000)).await;
    assert_eq!(arrived(&mut raw, 1).await.0, 0, "the connection's is used up");
    raw.write(&update(0, 50_000)).await;
    assert_eq!(arrived(&mut raw, 1).await.0, 50_000);
    raw.write(&[setting(5, 30_000), update(0, 1_000_000)].concat()).await;
    assert_eq!(arrived(&mut raw, 1).await, (50_000, 16_375), "whole records");
    raw.write(&update(1, 1_000_000)).await;
    assert_eq!(arrived(&mut raw, 1).await.0, 300_000 - 65_535 - 100_000);
}

#[tokio::test]
async fn a_window_that_shrinks_below_nothing_is_paid_back_first() {
    let (mut raw, _tasks, _ended) = Raw::client(sender(300_000)).await;
    raw.write(&[setting(4, 50_000), update(0, 1_000_000)].concat()).await;
    raw.connect(1, false).await;
    assert_eq!(arrived(&mut raw, 1).await.0, 50_000);
    raw.write(&setting(4, 10_000)).await;
    raw.write(&update(1, 40_000)).await;
    assert_eq!(arrived(&mut raw, 1).await.0, 0, "it was 40 000 below nothing");
    raw.write(&update(1, 5)).await;
    assert_eq!(arrived(&mut raw, 1).await.0, 5);
    raw.write(&setting(4, 20_000)).await;
    assert_eq!(arrived(&mut raw, 1).await.0, 10_000);
    // A new stream begins with what was said last; none may burst its window by a setting.
    raw.connect(3, false).await;
    assert_eq!(arrived(&mut raw, 3).await.0, 20_000);
    raw.write(&[update(3, 1), setting(4, frame::LARGEST)].concat()).await;
    assert_eq!(arrived(&mut raw, 3).await.0, 280_000);
    raw.write(&setting(4, 0)).await;
    raw.connect(5, false).await;
    assert_eq!(arrived(&mut raw, 5).await.0, 0);
    raw.write(&[update(5, frame::LARGEST), setting(4, 1)].concat()).await;
    assert_eq!(raw.goes_away().await.1, Reason::FLOW_CONTROL_ERROR);
}

/// Streams whose reader stalls, and one whose reader does not.
#[tokio::test]
async fn a_reader_that_stalls_holds_up_its_own_stream_only() {
    let (mut raw, _tasks, _ended) = Raw::client(|stream: Stream| async move {
        stream.answer(&[0x88], false).unwrap();
        let first = std::future::poll_fn(|cx| stream.poll_data(cx)).await.unwrap();
        if first[0] == b's' {
            return std::future::pending().await;
        }
        while data(&stream).await.is_ok_and(|bytes| !bytes.is_empty()) {}
        let _ = stream.finish();
    })
    .await;
    let window = usize::try_from(STREAM_WINDOW_BYTES).unwrap();
    let part = 16 << 10;
    // More stalled bytes than the connection's window has.
    let stalled = 8;
    for nth in 0..stalled {
        let stream = 2 * nth + 1;
        raw.connect(stream, false).await;
        for _ in 0..window / part {
            raw.frame(kind::DATA, 0, stream, &vec![b's'; part]).await;
        }
        raw.settle().await;
    }
    raw.connect(101, false).await;
    for _ in 0..100 {
        raw.frame(kind::DATA, 0, 101, &vec![b'f'; part]).await;
        raw.settle().await;
    }
    raw.frame(kind::DATA, flags::END_STREAM, 101, b"f").await;
    raw.until(|frame| matches!(frame, Frame::Data(data) if data.stream == 101 && data.end)).await;
    // One byte beyond the stream's window is the stream's error.
    raw.frame(kind::DATA, 0, 1, b"s").await;
    raw.until(is_reset(1, Reason::FLOW_CONTROL_ERROR)).await;
    raw.settle().await;
}

#[tokio::test]
async fn more_than_a_stream_takes_ends_it() {
    let (mut raw, _tasks, _ended) = Raw::client(|stream: Stream| async move {
        std::future::pending::<()>().await;
        drop(stream);
    })
    .await;
    raw.connect(1, false).await;
    let frame = framed(kind::DATA, 0, 1, &vec![0; 1 << 20]);
    for _ in 0..5 {
        raw.write(&frame).await;
    }
    raw.until(is_reset(1, Reason::FLOW_CONTROL_ERROR)).await;
    raw.settle().await;
}

/// Bytes for a stream that was reset are given back, so that the connection does not run dry.
#[tokio::test]
async fn late_bytes_do_not_eat_the_window() {
    let (mut raw, _tasks, _ended) =
        Raw::client(|stream: Stream| async move { stream.reset(Reason::CANCEL) }).await;
    let mut granted = u64::from(CONNECTION_WINDOW_BYTES);
    let mut sent = 0;
    raw.connect(1, false).await;
    raw.until(is_reset(1, Reason::CANCEL)).await;
    for _ in 0..60 {
        let part = 1 << 20;
        sent += part;
        assert!(sent <= granted, "{sent} of {granted}");
        raw.frame(kind::DATA, flags::PADDED, 1, &vec![9; usize::try_from(part).unwrap()]).await;
        raw.frame(kind::PING, 0, 0, b"settled?").await;
        loop {
            match raw.read().await.unwrap() {
                Frame::Pong(_) => break,
                Frame::Window { stream: 0, increment } => granted += u64::from(increment),
                frame => panic!("{frame:?}"),
            }
        }
    }
}

#[tokio::test]
async fn streams_wait_for_a_place_that_the_server_gives() {
    let (mut raw, handle, _tasks, _ended) = Raw::server().await;
    raw.write(&setting(3, 1)).await;
    raw.until(|frame| *frame == Frame::SettingsAck).await;
    let first = handle.open(&connect_block()).await.unwrap();
    raw.until(|frame| matches!(frame, Frame::Headers { stream: 1, .. })).await;
    let block = connect_block();
    let mut second = std::pin::pin!(handle.open(&block));
    let waits = std::future::poll_fn(|cx| Poll::Ready(second.as_mut().poll(cx).is_pending())).await;
    assert!(waits && handle.permitted() == 1);
    drop(first);
    tokio::time::timeout(LONG, second.as_mut()).await.unwrap().unwrap();
}

/// What a reader had in its hand when it was dropped is given back to the connection.
#[tokio::test]
async fn a_stream_dropped_with_bytes_in_hand_gives_them_back() {
    let (near, far) = duplex(1 << 20);
    let (near, far) = tls(near, far).await;
    let tasks = TaskGroup::new();
    let (handle, connection) = client(near);
    let _client = serve(&tasks, connection, |_| async { unreachable!() });
    let ours = server(far).await.unwrap();
    let shared = ours.shared.clone();
    let (sender, mut dropped) = tokio::sync::mpsc::channel(1);
    let _server = serve(&tasks, ours, move |stream| {
        let sender = sender.clone();
        async move {
            stream.answer(&[0x88], false).unwrap();
            let mut left = 100_000;
            while left > 0 {
                left -= data(&stream).await.unwrap().len();
            }
            drop(stream);
            sender.send(()).await.unwrap();
        }
    });
    for _ in 0..3 {
        let stream = handle.open(&connect_block()).await.unwrap();
        send(&stream, &[7; 100_000]).await.unwrap();
        tokio::time::timeout(LONG, dropped.recv()).await.unwrap().unwrap();
        assert_eq!(shared.window.lock().waiting(), 0);
    }
}

/// A writer that waits for the window of the connection hears of the end of its stream.
#[tokio::test]
async fn a_reset_reaches_a_writer_that_waits_for_the_connection() {
    let (sender, mut outcome) = tokio::sync::mpsc::channel(1);
    let (mut raw, _tasks, _ended) = Raw::client(move |stream: Stream| {
        let sender = sender.clone();
        async move {
            stream.answer(&[0x88], false).unwrap();
            sender.send(send(&stream, &[0; 1 << 20]).await).await.unwrap();
        }
    })
    .await;
    raw.write(&setting(4, 1 << 24)).await;
    // Its half has ended: nobody reads the stream.
    raw.connect(1, true).await;
    assert_eq!(arrived(&mut raw, 1).await.0, 65_535);
    raw.settle().await;
    raw.frame(kind::RST_STREAM, 0, 1, &8u32.to_be_bytes()).await;
    let outcome = tokio::time::timeout(LONG, outcome.recv()).await.expect("it is told").unwrap();
    assert!(matches!(outcome, Err(Failure::Reset(Reason::CANCEL))), "{outcome:?}");
}

/// The end that comes before the answer is one.
#[tokio::test]
async fn an_end_before_the_answer_counts() {
    let (mut raw, handle, _tasks, _ended) = Raw::server().await;
    let stream = handle.open(&connect_block()).await.unwrap();
    raw.frame(kind::DATA, flags::END_STREAM, 1, b"x").await;
    raw.frame(kind::HEADERS, flags::END_HEADERS, 1, &[0x88]).await;
    raw.settle().await;
    assert_eq!(data(&stream).await.unwrap(), "x");
    let end = tokio::time::timeout(LONG, data(&stream)).await.expect("an end");
    assert_eq!(end.unwrap(), "");
}

/// A PING is answered by what it said, and by nothing else.
#[tokio::test]
async fn an_answer_that_was_guessed_is_none() {
    let (near, far) = duplex(1 << 20);
    let (near, far) = tls(near, far).await;
    let (_handle, connection) = client(near);
    let mut pings = connection.pings();
    let (mut raw, _tasks, _ended) = Raw::facing(connection, far).await;
    let mut ping = Box::pin(pings.ping());
    assert!(std::future::poll_fn(|cx| Poll::Ready(ping.as_mut().poll(cx).is_pending())).await);
    let Frame::Ping(asked) = raw.until(|frame| matches!(frame, Frame::Ping(_))).await else { unreachable!() };
    for guess in [1u64, 2, u64::MAX] {
        raw.frame(kind::PING, flags::ACK, 0, &guess.to_be_bytes()).await;
    }
    raw.settle().await;
    assert!(std::future::poll_fn(|cx| Poll::Ready(ping.as_mut().poll(cx).is_pending())).await);
    raw.frame(kind::PING, flags::ACK, 0, &asked).await;
    tokio::time::timeout(LONG, ping).await.expect("answered");
}
