//! A small seeded mutator: without coverage feedback, so it leans on good seeds, splices and a dictionary.

/// SplitMix64: repeatable by its seed.
pub struct Chance(u64);

impl Chance {
    pub fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform enough below `bound`; 0 for a bound of 0.
    pub fn below(&mut self, bound: usize) -> usize {
        if bound == 0 { 0 } else { (self.next() % bound as u64) as usize }
    }
}

/// Inputs never grow beyond this.
const LARGEST: usize = 64 << 10;

/// Values at which arithmetic goes wrong.
const EDGES: [u8; 8] = [0, 1, 0x7f, 0x80, 0xff, b'/', b'%', b'\n'];

/// Writes a mutation of one of `seeds` into `out`.
pub fn mutate(chance: &mut Chance, seeds: &[Vec<u8>], dictionary: &[&[u8]], out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&seeds[chance.below(seeds.len())]);
    // Mostly few changes: many at once rarely come past the first check of a parser.
    let most = 1 << chance.below(5);
    let changes = 1 + chance.below(most);
    for _ in 0..changes {
        change(chance, seeds, dictionary, out);
    }
    out.truncate(LARGEST);
}

fn change(chance: &mut Chance, seeds: &[Vec<u8>], dictionary: &[&[u8]], out: &mut Vec<u8>) {
    let at = chance.below(out.len() + 1);
    match chance.below(10) {
        0 if at < out.len() => out[at] ^= 1 << chance.below(8),
        1 if at < out.len() => out[at] = EDGES[chance.below(EDGES.len())],
        2 if at < out.len() => out[at] = chance.next() as u8,
        3 => out.insert(at, chance.next() as u8),
        4 => out.truncate(at),
        5 => {
            let end = (at + chance.below(32)).min(out.len());
            out.drain(at..end);
        }
        6 => {
            let end = (at + chance.below(64)).min(out.len());
            let copy = out[at..end].to_vec();
            let to = chance.below(out.len() + 1);
            out.splice(to..to, copy);
        }
        7 | 8 if !dictionary.is_empty() => {
            let word = dictionary[chance.below(dictionary.len())];
            let replaced = if chance.below(2) == 0 { 0 } else { word.len() };
            let end = (at + replaced).min(out.len());
            out.splice(at..end, word.iter().copied());
        }
        _ => {
            let other = &seeds[chance.below(seeds.len())];
            let from = chance.below(other.len());
            out.truncate(at);
            out.extend_from_slice(&other[from..]);
        }
    }
}
