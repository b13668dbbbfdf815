//! The examples of RFC 7541, appendix C, and what must not be taken.

use super::*;

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
}

fn read(decoder: &mut Decoder, block: &[u8]) -> Result<Vec<(String, String)>, Malformed> {
    let mut all = Vec::new();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    decoder.decode(block, 1 << 20, |name, value| all.push((text(name), text(value))))?;
    Ok(all)
}

/// A block, what it says, and what the table holds then, bytes.
type Example<'e> = (&'e str, &'e [(&'e str, &'e str)], usize);

fn check(blocks: &[Example<'_>]) {
    let mut decoder = Decoder::default();
    for (block, expected, used) in blocks {
        let got = read(&mut decoder, &bytes(block)).unwrap();
        let got: Vec<(&str, &str)> = got.iter().map(|(name, value)| (&**name, &**value)).collect();
        assert_eq!((&got[..], decoder.used), (*expected, *used), "{block}");
    }
}

#[test]
fn integers_as_in_c_1() {
    let read = |bytes: &[u8], prefix| integer(&mut &bytes[..], prefix);
    assert_eq!(read(&[0b1110_1010], 5), Ok(10));
    assert_eq!(read(&[0x1f, 0x9a, 0x0a], 5), Ok(1337));
    assert_eq!(read(&[42], 7), Ok(42));
    assert_eq!(read(&[0x1f, 0x9a], 5), Err(Malformed), "cut off");
    assert_eq!(read(&[0x1f, 0xff, 0xff, 0xff, 0xff, 0x0f], 5), Err(Malformed), "too large");
    assert_eq!(read(&[0x1f, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80], 5), Err(Malformed), "too long");
}

#[test]
fn literals_as_in_c_2() {
    check(&[(
        "400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572",
        &[("custom-key", "custom-header")],
        55,
    )]);
    check(&[("040c 2f73 616d 706c 652f 7061 7468", &[(":path", "/sample/path")], 0)]);
    check(&[("1008 7061 7373 776f 7264 0673 6563 7265 74", &[("password", "secret")], 0)]);
    check(&[("82", &[(":method", "GET")], 0)]);
}

const FIRST: &[(&str, &str)] =
    &[(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")];
const SECOND: &[(&str, &str)] = &[
    (":method", "GET"),
    (":scheme", "http"),
    (":path", "/"),
    (":authority", "www.example.com"),
    ("cache-control", "no-cache"),
];
const THIRD: &[(&str, &str)] = &[
    (":method", "GET"),
    (":scheme", "https"),
    (":path", "/index.html"),
    (":authority", "www.example.com"),
    ("custom-key", "custom-value"),
];

#[test]
fn requests_as_in_c_3() {
    check(&[
        ("8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d", FIRST, 57),
        ("8286 84be 5808 6e6f 2d63 6163 6865", SECOND, 110),
        ("8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65", THIRD, 164),
    ]);
}

#[test]
fn requests_by_huffman_as_in_c_4() {
    check(&[
        ("8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff", FIRST, 57),
        ("8286 84be 5886 a8eb 1064 9cbf", SECOND, 110),
        ("8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf", THIRD, 164),
    ]);
}

/// With a table of 256 bytes, so that entries are pushed out.
#[test]
fn answers_by_huffman_as_in_c_6() {
    let date = ("date", "Mon, 21 Oct 2013 20:13:21 GMT");
    let (private, location) = (("cache-control", "private"), ("location", "https://www.example.com"));
    let cookie = "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1";
    check(&[
        (
            "3fe1 01 4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d
             29ad 1718 63c7 8f0b 97c8 e9ae 82ae 43d3",
            &[(":status", "302"), private, date, location],
            222,
        ),
        ("4883 640e ffc1 c0bf", &[(":status", "307"), private, date, location], 222),
        (
            "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2 e6c7
             b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
            &[
                (":status", "200"),
                private,
                ("date", "Mon, 21 Oct 2013 20:13:22 GMT"),
                location,
                ("content-encoding", "gzip"),
                ("set-cookie", cookie),
            ],
            215,
        ),
    ]);
}

#[test]
fn what_means_nothing_is_refused() {
    for block in ["80", "be", "ff ff ff ff ff 0f", "40 01", "00 05 61", "3f e2 1f", "82 20", "00 81 00 00"] {
        assert_eq!(read(&mut Decoder::default(), &bytes(block)), Err(Malformed), "{block}");
    }
    // A smaller table and back again, before the first header.
    assert!(read(&mut Decoder::default(), &bytes("20 3f e1 1f 82")).is_ok());
}

/// Two hundred bytes that stand for 800 KiB.
#[test]
fn a_bomb_is_counted_and_not_built() {
    let mut decoder = Decoder::default();
    let mut block = Encoder::default().literal(b"x", &[b'a'; 3900]).finish();
    block[0] = 0x40;
    let swollen = [&block[..], &[0xbe; 200]].concat();
    assert_eq!(Decoder::default().decode(&swollen, 16 << 10, |_, _| {}), Err(Malformed));
    block.extend([0xbe; 10]);
    let (mut shown, mut count) = (0, 0);
    let all = decoder.decode(&block, 16 << 10, |name, value| {
        shown += name.len() + value.len() + ENTRY_BYTES;
        count += 1;
    });
    assert_eq!(all, Ok(false));
    assert!(shown <= 16 << 10 && count == 4, "{shown} in {count}");
}

#[test]
fn what_is_written_is_read() {
    for size in [0, 1, 126, 127, 128, 254, 255, 300, 16_000] {
        let value = vec![b'v'; size];
        let block = Encoder::default().indexed(8).named(1, b"a:1").literal(b"baggage", &value).finish();
        let got = read(&mut Decoder::default(), &block).unwrap();
        assert_eq!(got[0], (":status".into(), "200".into()));
        assert_eq!(got[1], (":authority".into(), "a:1".into()));
        assert_eq!((&*got[2].0, got[2].1.as_bytes()), ("baggage", &value[..]));
    }
}

proptest::proptest! {
    #[test]
    fn garbage_never_panics(blocks in proptest::collection::vec(proptest::collection::vec(0u8.., 0..200), 1..8)) {
        let mut decoder = Decoder::default();
        for block in blocks {
            let _ = read(&mut decoder, &block);
            assert!(decoder.used <= TABLE_BYTES);
        }
    }
}
