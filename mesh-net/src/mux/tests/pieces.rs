//! What frames say does not depend on the pieces they come in.

use proptest::{collection::vec, prelude::*};

use super::*;

/// The frames of `bytes` in pieces of `size`, those of DATA put together, and the error at the end.
fn parsed(bytes: &[u8], size: usize) -> (Vec<Frame>, Option<Broken>) {
    let mut parser = Parser::of_server();
    let mut frames: Vec<Frame> = Vec::new();
    let mut open = false;
    for piece in bytes.chunks(size) {
        let mut input = Bytes::copy_from_slice(piece);
        loop {
            match parser.next(&mut input) {
                Ok(None) => break,
                Err(broken) => return (frames, Some(broken)),
                Ok(Some(Frame::Data(data))) if open && data.charge.is_none() => {
                    let Some(Frame::Data(before)) = frames.last_mut() else { unreachable!() };
                    before.payload = [&before.payload[..], &data.payload].concat().into();
                    before.end |= data.end;
                }
                Ok(Some(frame)) => {
                    open = matches!(frame, Frame::Data(_));
                    frames.push(frame);
                }
            }
        }
        assert!(input.is_empty());
    }
    (frames, None)
}

/// Of a DATA frame that is cut off, how much has come depends on where it is cut, so only whole frames are compared.
fn whole() -> impl Strategy<Value = Vec<u8>> {
    let payload = prop_oneof![
        vec(any::<u8>(), 0..12),
        Just(connect_block()),
        Just(vec![0, 0, 0, 9]),
        vec(0u8..2, 0..300)
    ];
    let frame = (0u8..11, prop_oneof![any::<u8>(), Just(4), Just(0), Just(1)], 0u32..4, payload);
    vec(frame, 0..12).prop_map(|frames| {
        frames
            .iter()
            .flat_map(|(kind, flags, stream, payload)| framed(*kind, *flags, *stream, payload))
            .collect()
    })
}

proptest! {
    #[test]
    fn pieces_do_not_matter(bytes in whole(), size in 1usize..50) {
        let (mut at_once, mut in_pieces) = (parsed(&bytes, bytes.len().max(1)), parsed(&bytes, size));
        // Empty pieces of a frame say nothing.
        for frames in [&mut at_once.0, &mut in_pieces.0] {
            for frame in frames.iter_mut() {
                if let Frame::Data(data) = frame { data.payload = data.payload.to_vec().into() }
            }
        }
        prop_assert_eq!(at_once, in_pieces);
    }
}
