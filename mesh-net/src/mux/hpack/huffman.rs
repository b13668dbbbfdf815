//! The Huffman code of RFC 7541, appendix B. It is canonical: the lengths say everything.

/// Length of the code of each byte, bits; the last is the end of a string, which never is written.
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28,
    28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6,
    6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7,
    8, 13, 19, 13, 14, 6, 15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7,
    15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24,
    23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23,
    23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26,
    26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20,
    21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27,
    27, 27, 26, 30,
];
const LONGEST: usize = 30;
const END: u16 = 256;

/// All codes of one length: the first of them, how many there are, and where their bytes begin in [`Code::symbols`].
#[derive(Clone, Copy)]
struct Row {
    first: u32,
    count: u32,
    start: u32,
}

struct Code {
    rows: [Row; LONGEST + 1],
    symbols: [u16; 257],
}

static CODE: Code = code();

const fn code() -> Code {
    let mut made = Code { rows: [Row { first: 0, count: 0, start: 0 }; LONGEST + 1], symbols: [0; 257] };
    let (mut next, mut filled, mut bits) = (0, 0, 1);
    while bits <= LONGEST {
        next <<= 1;
        made.rows[bits] = Row { first: next, count: 0, start: filled };
        let mut symbol = 0;
        while symbol < LENGTHS.len() {
            if LENGTHS[symbol] as usize == bits {
                made.symbols[filled as usize] = symbol as u16;
                made.rows[bits].count += 1;
                filled += 1;
                next += 1;
            }
            symbol += 1;
        }
        bits += 1;
    }
    made
}

/// Appends what `coded` says, or none if it says nothing sensible.
pub fn decode(coded: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let (mut seen, mut bits) = (0u32, 0usize);
    for byte in coded {
        for at in (0..8).rev() {
            seen = seen << 1 | u32::from(byte >> at & 1);
            bits += 1;
            let row = CODE.rows.get(bits)?;
            if let Some(nth) = seen.checked_sub(row.first)
                && nth < row.count
            {
                let symbol = *CODE.symbols.get(usize::try_from(row.start + nth).ok()?)?;
                if symbol == END {
                    return None;
                }
                out.push(u8::try_from(symbol).ok()?);
                (seen, bits) = (0, 0);
            }
        }
    }
    // What is left over is the beginning of the end, and no whole byte.
    (bits < 8 && seen == (1 << bits) - 1).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_complete() {
        let used: u64 = LENGTHS.iter().map(|bits| 1 << (LONGEST - usize::from(*bits))).sum();
        assert_eq!(used, 1 << LONGEST);
    }

    #[test]
    fn padding_is_ones_and_short() {
        let decoded = |coded: &[u8]| {
            let mut out = Vec::new();
            decode(coded, &mut out).map(|()| out)
        };
        assert_eq!(decoded(&[]), Some(vec![]));
        assert_eq!(decoded(&[0b0000_0111]), Some(b"0".to_vec()), "code 00000");
        assert_eq!(decoded(&[0b0000_0000]), None, "padded by zeros");
        assert_eq!(decoded(&[0b0000_0111, 0xff]), None, "padded by more than it takes");
        assert_eq!(decoded(&[0xff; 4]), None, "the end, in full");
    }
}
