//! Counter-based randomness: a value depends on its key and its counter, never on what was drawn before.
//!
//! So the noise of a sample is the same whichever worker draws it, in whichever order.
//! Source: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

const ROUNDS: u32 = 10;
const MULTIPLIER_0: u32 = 0xD251_1F53;
const MULTIPLIER_1: u32 = 0xCD9E_8D57;
const WEYL_0: u32 = 0x9E37_79B9;
const WEYL_1: u32 = 0xBB67_AE85;

/// What a stream of random numbers is for. Streams of different purposes never share numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial values of the parameter tensor with the given index.
    Initialisation = 1,
    /// Which shard a sample belongs to.
    ShardAssignment = 2,
    /// The order of a shard's samples in an epoch.
    EpochOrder = 3,
    /// Inputs of the self-test behind the numerics fingerprint.
    SelfTest = 4,
    /// Which leaves of a round are computed twice, and by whom.
    SpotCheck = 5,
}

/// A stream of random numbers, addressed by (seed, purpose, two indices).
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    /// The three upper words of the counter.
    address: [u32; 3],
    block: u32,
    buffer: [u32; 4],
    used: usize,
}

impl Stream {
    /// The stream of `purpose` under `seed`, for the things numbered `first` and `second` (such as epoch and shard).
    pub fn new(seed: u64, purpose: Purpose, first: u32, second: u32) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            address: [purpose as u32, first, second],
            block: 0,
            buffer: [0; 4],
            used: 4,
        }
    }

    /// The next 32 random bits.
    ///
    /// # Panics
    /// After 2^34 numbers, which no purpose comes near.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.buffer = philox([self.block, self.address[0], self.address[1], self.address[2]], self.key);
            self.block = self.block.checked_add(1).expect("a stream holds 2^34 numbers");
            self.used = 0;
        }
        self.used += 1;
        self.buffer[self.used - 1]
    }

    /// A number in [0, 1), a multiple of 2^-24.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// A number in [0, bound), each equally likely. Source: Lemire, "Fast random integer generation in an interval", 2019.
    ///
    /// # Panics
    /// When `bound` is 0.
    pub fn below(&mut self, bound: u32) -> u32 {
        assert!(bound > 0, "no number lies below 0");
        loop {
            let product = u64::from(self.next_u32()) * u64::from(bound);
            let low = product as u32;
            // The first `2^32 mod bound` values of the low half would be drawn once too often.
            if low >= bound || low >= bound.wrapping_neg() % bound {
                return (product >> 32) as u32;
            }
        }
    }

    /// Puts `items` into a random order (Fisher and Yates, in Durstenfeld's form).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(u32::try_from(i + 1).expect("at most 2^32 items are shuffled"));
            items.swap(i, j as usize);
        }
    }
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL_0), key[1].wrapping_add(WEYL_1)];
        }
        let a = u64::from(MULTIPLIER_0) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIER_1) * u64::from(counter[2]);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_known_answers_of_its_authors() {
        // From kat_vectors of Random123, lines `philox4x32 10`.
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn shuffles_are_permutations_and_differ_by_address() {
        let order = |purpose, first, second| {
            let mut items: Vec<u32> = (0..100).collect();
            Stream::new(7, purpose, first, second).shuffle(&mut items);
            items
        };
        let first = order(Purpose::EpochOrder, 0, 0);
        assert_eq!(first, order(Purpose::EpochOrder, 0, 0));
        for other in
            [order(Purpose::EpochOrder, 1, 0), order(Purpose::EpochOrder, 0, 1), order(Purpose::ShardAssignment, 0, 0)]
        {
            assert_ne!(first, other);
        }
        let mut sorted = first;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<u32>>());
    }

    #[test]
    fn draws_below_a_bound_are_even() {
        let mut stream = Stream::new(1, Purpose::SelfTest, 0, 0);
        let mut counts = [0u32; 7];
        (0..70_000).for_each(|_| counts[stream.below(7) as usize] += 1);
        assert!(counts.iter().all(|&count| count.abs_diff(10_000) < 500), "{counts:?}");
    }
}
