//! Hashes: a fast 128-bit one for every round, SHA-256 for what a run ends with.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use twox_hash::xxhash3_128::{DEFAULT_SECRET_LENGTH, Hasher, RawHasher, SecretBuffer};

/// A fast, non-cryptographic 128-bit digest (XXH3), shown as 32 hexadecimal digits.
///
/// It finds accidents (torn writes, wrong samples, diverged parameters), not attacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub u128);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Hasher::oneshot(bytes))
    }

    /// The digest of the little-endian bytes of `values`.
    pub fn of_floats(values: &[f32]) -> Self {
        let mut hasher = DigestBuilder::default();
        hasher.floats(values);
        hasher.finish()
    }
}

/// Builds a [`Digest`] from pieces; the pieces' boundaries do not matter.
pub struct DigestBuilder(RawHasher<&'static [u8; DEFAULT_SECRET_LENGTH]>);

impl Default for DigestBuilder {
    fn default() -> Self {
        Self(RawHasher::new(SecretBuffer::default()))
    }
}

impl DigestBuilder {
    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    /// Appends a number, little-endian.
    pub fn number(&mut self, value: u64) {
        self.0.write(&value.to_le_bytes());
    }

    /// Appends the little-endian bytes of `values`.
    pub fn floats(&mut self, values: &[f32]) {
        for_le_bytes(values, |bytes| self.0.write(bytes));
    }

    /// The digest of everything appended.
    pub fn finish(&self) -> Digest {
        Digest(self.0.finish_128())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        if text.len() != 32 {
            return Err(serde::de::Error::custom(format!("a digest has 32 hexadecimal digits, not {}", text.len())));
        }
        u128::from_str_radix(&text, 16).map(Self).map_err(serde::de::Error::custom)
    }
}

/// SHA-256 of the little-endian bytes of `values`, as 64 hexadecimal digits: the `params_sha256` of a summary.
pub fn sha256_of_floats(values: &[f32]) -> String {
    let mut hasher = Sha256::new();
    for_le_bytes(values, |bytes| hasher.update(bytes));
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hands over the little-endian bytes of `values`, in one piece where that is how they lie in memory.
pub(crate) fn for_le_bytes(values: &[f32], mut consume: impl FnMut(&[u8])) {
    if cfg!(target_endian = "little") {
        consume(bytemuck::cast_slice(values));
    } else {
        values.iter().for_each(|value| consume(&value.to_le_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_do_not_depend_on_piece_boundaries_and_survive_text() {
        let values = [1.0f32, -0.0, f32::MIN_POSITIVE];
        let mut pieces = DigestBuilder::default();
        pieces.floats(&values[..1]);
        pieces.floats(&values[1..]);
        assert_eq!(pieces.finish(), Digest::of_floats(&values));
        let text = serde_json::to_string(&pieces.finish()).unwrap();
        assert_eq!(serde_json::from_str::<Digest>(&text).unwrap(), pieces.finish());
        assert!(serde_json::from_str::<Digest>("\"12\"").is_err());
        assert_ne!(Digest::of_floats(&[0.0]), Digest::of_floats(&[-0.0]), "bits are compared, not values");
    }

    #[test]
    fn sha256_is_of_little_endian_bytes() {
        // Python: hashlib.sha256(struct.pack('<2f', 1.0, 2.0)).hexdigest()
        assert_eq!(sha256_of_floats(&[1.0, 2.0]), "b9c80b5adeca450753a16950c3cc655d271f7bef7a485bc83f112b72fef21d37");
    }
}
