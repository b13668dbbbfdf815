//! Peers that make work: each is cut, or held to its bounds.

use std::sync::atomic::AtomicUsize;

use super::*;

/// Repeats `bytes` and reads nothing until the connection is gone.
async fn unread(bytes: Vec<u8>) -> Cause {
    let (mut raw, tasks, ended) = Raw::client(echoing).await;
    let flood = async {
        let many = bytes.repeat((16 << 10) / bytes.len() + 1);
        while raw.try_write(&many).await.is_ok() {}
    };
    tokio::select! {
        cause = tokio::time::timeout(LONG, ended) => {
            assert_eq!(tasks.panics(), 0);
            cause.expect("the flood is cut").unwrap()
        }
        () = async { flood.await; std::future::pending().await } => unreachable!()
    }
}

#[tokio::test]
async fn answers_that_are_not_read_and_frames_that_bring_nothing_end_the_connection() {
    for bytes in [
        framed(kind::PING, 0, 0, &[1; 8]),
        framed(kind::PING, flags::ACK, 0, &[1; 8]),
        framed(kind::SETTINGS, 0, 0, &[]),
        framed(kind::SETTINGS, 0, 0, &[0, 4, 0, 0, 0xff, 0xff]),
        framed(kind::PRIORITY, 0, 1, &[0; 5]),
        framed(0xbb, 0, 0, &[]),
    ] {
        let cause = unread(bytes.clone()).await;
        let calm = matches!(cause, Cause::Broken(Broken { reason: Reason::ENHANCE_YOUR_CALM, .. }));
        assert!(calm, "{bytes:?}: {cause}");
    }
}

/// PINGs whose answers are read end it as well, once they are too many.
#[tokio::test]
async fn empty_data_and_continuations_without_end_are_cut() {
    let (mut raw, _tasks, _ended) = Raw::client(echoing).await;
    raw.connect(1, false).await;
    raw.until(|frame| matches!(frame, Frame::Headers { .. })).await;
    raw.write(&framed(kind::DATA, 0, 1, &[]).repeat(12_000)).await;
    assert_eq!(raw.goes_away().await.1, Reason::ENHANCE_YOUR_CALM);

    let (mut raw, _tasks, _ended) = Raw::client(echoing).await;
    raw.frame(kind::HEADERS, 0, 1, &connect_block()).await;
    raw.write(&framed(kind::CONTINUATION, 0, 1, &[]).repeat(20)).await;
    assert_eq!(raw.goes_away().await.1, Reason::ENHANCE_YOUR_CALM);

    let (mut raw, _tasks, _ended) = Raw::client(echoing).await;
    raw.frame(kind::HEADERS, 0, 1, &vec![0; 20 << 10]).await;
    raw.frame(kind::CONTINUATION, 0, 1, &vec![0; 20 << 10]).await;
    assert_eq!(raw.goes_away().await.1, Reason::ENHANCE_YOUR_CALM);
}

/// Also with a byte that nobody has answered.
#[tokio::test]
async fn streams_opened_to_be_reset_are_counted() {
    opened_to_be_reset(None).await;
    opened_to_be_reset(Some(b'x')).await;
}

async fn opened_to_be_reset(byte: Option<u8>) {
    let handled = Arc::new(AtomicUsize::new(0));
    let count = handled.clone();
    let (mut raw, _tasks, ended) = Raw::client(move |stream| {
        count.fetch_add(1, Ordering::SeqCst);
        // Holds its stream as an application that is slow to connect to does.
        async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            drop(stream);
        }
    })
    .await;
    let attack = async {
        for stream in (1..).step_by(2) {
            let connect = framed(kind::HEADERS, flags::END_HEADERS, stream, &connect_block());
            let reset = framed(kind::RST_STREAM, 0, stream, &[0, 0, 0, 8]);
            let data = byte.map_or_else(Vec::new, |byte| framed(kind::DATA, 0, stream, &[byte]));
            if raw.try_write(&[connect, data, reset].concat()).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = async { attack.await; std::future::pending().await } => {}
        cause = tokio::time::timeout(LONG, ended) => {
            let cause = cause.expect("the attacker is cut").unwrap();
            // For this, and not for what it does besides.
            assert!(cause.to_string().contains("opened to be reset"), "{cause}");
        }
    }
    assert!(handled.load(Ordering::SeqCst) > 500);
}

/// Streams that are gone, but whose applications are still being connected to.
#[tokio::test]
async fn streams_that_are_held_are_bounded() {
    let handled = Arc::new(AtomicUsize::new(0));
    let count = handled.clone();
    let (mut raw, _tasks, _ended) = Raw::client(move |stream| {
        count.fetch_add(1, Ordering::SeqCst);
        async move {
            std::future::pending::<()>().await;
            drop(stream);
        }
    })
    .await;
    for stream in (1..2000).step_by(2) {
        raw.connect(stream, false).await;
        raw.frame(kind::RST_STREAM, 0, stream, &[0, 0, 0, 8]).await;
    }
    raw.until(is_reset(1999, Reason::REFUSED_STREAM)).await;
    assert_eq!(handled.load(Ordering::SeqCst), HELD_STREAMS);
}

#[tokio::test]
async fn one_stream_too_many_is_refused_and_no_more() {
    let (mut raw, _tasks, _ended) = Raw::client(echoing).await;
    let last = u32::try_from(2 * STREAMS + 1).unwrap();
    for stream in (1..=last).step_by(2) {
        raw.connect(stream, false).await;
    }
    raw.until(is_reset(last, Reason::REFUSED_STREAM)).await;
    // Late bytes on it mean nothing; a place that gets free is given again.
    raw.frame(kind::DATA, 0, last, b"late").await;
    raw.frame(kind::DATA, flags::END_STREAM, 1, b"x").await;
    raw.until(|frame| matches!(frame, Frame::Data(data) if data.stream == 1 && data.end)).await;
    raw.connect(last + 2, false).await;
    raw.until(|frame| matches!(frame, Frame::Headers { stream, .. } if *stream == last + 2)).await;
}

#[tokio::test]
async fn a_list_of_headers_that_is_too_long_is_answered_431() {
    let (mut raw, _tasks, _ended) = Raw::client(echoing).await;
    let mut block = connect_block();
    let mut kept = Encoder::default().literal(b"x", &[b'a'; 3000]).finish();
    kept[0] = 0x40;
    block.extend(kept);
    block.extend([0xbe; 15]);
    raw.frame(kind::HEADERS, flags::END_HEADERS, 1, &block).await;
    let frame = raw.until(|frame| matches!(frame, Frame::Headers { stream: 1, .. })).await;
    let Frame::Headers { block, end: true, .. } = frame else { panic!("{frame:?}") };
    let read = head::read(&mut hpack::Decoder::default(), &block, 1000).unwrap();
    assert!(matches!(read, head::Block::Head(head) if head.status == Some(431)));
    raw.until(is_reset(1, Reason::NO_ERROR)).await;
    // The table was kept in step.
    raw.frame(kind::HEADERS, flags::END_HEADERS, 3, &[&connect_block()[..], &[0xbe]].concat()).await;
    raw.until(|frame| matches!(frame, Frame::Headers { stream: 3, end: false, .. })).await;
}

/// A byte at a time for a reader that stalls costs about a byte at a time.
#[tokio::test]
async fn small_frames_for_a_stalled_reader_are_put_together() {
    let (sender, mut streams) = tokio::sync::mpsc::channel(1);
    let (mut raw, _tasks, _ended) = Raw::client(move |stream| {
        let sender = sender.clone();
        async move { drop(sender.send(stream).await) }
    })
    .await;
    raw.connect(1, false).await;
    let stream = streams.recv().await.unwrap();
    for _ in 0..100 {
        raw.write(&framed(kind::DATA, 0, 1, b"x").repeat(1000)).await;
    }
    raw.settle().await;
    let mut chunks = Vec::new();
    while let Some(chunk) = stream.more_data() {
        chunks.push(chunk);
    }
    assert_eq!(chunks.iter().map(Bytes::len).sum::<usize>(), 100_000);
    assert!(chunks.len() < 10, "{}", chunks.len());
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(300))]

    /// The frames need not make sense; nothing panics, and nothing hangs.
    #[test]
    fn garbage_never_panics(
        frames in proptest::collection::vec(
            (0u8..11, 0u8.., 0u32..12, proptest::collection::vec(0u8.., 0..40)),
            0..40,
        ),
        noise in proptest::collection::vec(0u8.., 0..64),
        role in 0u8..2,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut bytes: Vec<u8> =
                frames.iter().flat_map(|(kind, flags, stream, payload)| framed(*kind, *flags, *stream, payload)).collect();
            bytes.extend(&noise);
            if role == 0 {
                let (mut raw, tasks, ended) = Raw::client(echoing).await;
                raw.connect(1, false).await;
                raw.write(&bytes).await;
                drop(raw);
                tokio::time::timeout(LONG, ended).await.unwrap().unwrap();
                assert_eq!(tasks.panics(), 0);
            } else {
                let (mut raw, handle, tasks, ended) = Raw::server().await;
                let streams = [handle.open(&connect_block()).await, handle.open(&connect_block()).await];
                raw.write(&bytes).await;
                drop(raw);
                tokio::time::timeout(LONG, ended).await.unwrap().unwrap();
                for stream in streams.into_iter().flatten() {
                    while data(&stream).await.is_ok_and(|bytes| !bytes.is_empty()) {}
                }
                assert_eq!(tasks.panics(), 0);
            }
        });
    }
}

/// Streams that are answered and over at once are no way around the bound on answers.
#[tokio::test]
async fn answers_to_streams_that_are_not_read_end_the_connection() {
    // By the driver itself, as requests are that no tunnel is for.
    let (mut raw, tasks, ended) = Raw::client(|stream: Stream| {
        let _ = stream.answer(&[0x88], true);
        std::future::ready(())
    })
    .await;
    let flood = async {
        for stream in (1..400_000).step_by(2) {
            let block =
                framed(kind::HEADERS, flags::END_HEADERS | flags::END_STREAM, stream, &connect_block());
            if raw.try_write(&block).await.is_err() {
                break;
            }
        }
    };
    let cause = async { tokio::time::timeout(LONG, ended).await.expect("the flood is cut").unwrap() };
    let ((), cause) = tokio::join!(flood, cause);
    let calm = matches!(cause, Cause::Broken(Broken { reason: Reason::ENHANCE_YOUR_CALM, .. }));
    assert!(calm && tasks.panics() == 0, "{cause}");
}

/// Two bytes for four thousand, again and again.
#[tokio::test]
async fn a_block_that_swells_beyond_all_bounds_ends_the_connection() {
    let (mut raw, _tasks, _ended) = Raw::client(echoing).await;
    let name = [vec![0x40, 0x7f, 0x80, 0x1f], vec![b'x'; 127 + (0x1f << 7)], vec![0]].concat();
    let mut block = name;
    block.extend([0x7e, 0].repeat(2_000));
    raw.frame(kind::HEADERS, flags::END_HEADERS, 1, &block).await;
    assert_eq!(raw.goes_away().await.1, Reason::COMPRESSION_ERROR);
}

/// A byte that waits does not hold on to the large buffer that it came in.
#[test]
fn what_is_small_is_copied_out_of_its_buffer() {
    let buffer = Bytes::from(vec![1; 256 << 10]);
    let core = cell::Core::new(1, 0, 1 << 20, false);
    for size in [1, 4 << 10, 16 << 10] {
        let slice = buffer.slice(..size);
        assert!(core.charge(u32::try_from(size).unwrap(), 0));
        assert!(matches!(core.receive((slice, buffer.len()), true, false), cell::Taken::Queued(..)));
    }
    let mut cell = core.cell.lock();
    let all: Vec<Bytes> = std::iter::from_fn(|| cell.pop()).collect();
    let within = |bytes: &Bytes| buffer.as_ptr_range().contains(&bytes.as_ptr());
    assert_eq!(
        all.iter().map(|bytes| (bytes.len(), within(bytes))).collect::<Vec<_>>(),
        [(4097, false), (16 << 10, true)]
    );
    assert_eq!(cell.clear(), 4097 + (16 << 10));
}
