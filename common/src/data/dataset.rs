//! Samples in memory.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{DataError, Fault};
use crate::shape::Shape;

/// The type of a data set's elements, in memory and on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Unsigned bytes, which stand for `value / 255`.
    U8,
    /// 32-bit floats, which stand for themselves.
    F32,
}

impl Dtype {
    /// The size of an element, in bytes.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F32 => 4,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::U8 => "u8",
            Self::F32 => "f32",
        })
    }
}

/// The elements of many samples, one sample after the other.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    /// Unsigned bytes.
    U8(Vec<u8>),
    /// 32-bit floats.
    F32(Vec<f32>),
}

impl Elements {
    /// How many there are, over all samples.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(elements) => elements.len(),
            Self::F32(elements) => elements.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::U8(_) => Dtype::U8,
            Self::F32(_) => Dtype::F32,
        }
    }
}

/// The elements of one sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SampleView<'a> {
    /// Unsigned bytes.
    U8(&'a [u8]),
    /// 32-bit floats.
    F32(&'a [f32]),
}

impl SampleView<'_> {
    /// Writes the sample as a model sees it to `out`: bytes as `value / 255` (Keras' convention), floats as they are.
    ///
    /// # Panics
    /// When `out` does not have the sample's number of elements.
    pub fn write_f32(&self, out: &mut [f32]) {
        match self {
            Self::U8(elements) => {
                assert_eq!(elements.len(), out.len(), "a sample and the place for it differ in size");
                for (out, &element) in out.iter_mut().zip(*elements) {
                    *out = UNIT_INTERVAL[usize::from(element)];
                }
            }
            Self::F32(elements) => out.copy_from_slice(elements),
        }
    }
}

/// `byte / 255` for every byte. A table rather than a multiplication with 1/255, which would round differently.
static UNIT_INTERVAL: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < table.len() {
        table[byte] = byte as f32 / 255.0;
        byte += 1;
    }
    table
};

/// Samples of one shape and one element type, in memory.
#[derive(Clone, PartialEq)]
pub struct Dataset {
    name: String,
    sample_shape: Shape,
    sample_elements: usize,
    elements: Elements,
}

impl Dataset {
    /// A data set of at least one sample. `name` is for messages; `elements`: (samples, ...`sample_shape`).
    ///
    /// # Errors
    /// When the elements are none, are not a whole number of samples, or are not all finite.
    pub fn new(name: impl Into<String>, sample_shape: Shape, elements: Elements) -> Result<Self, DataError> {
        let dataset = Self::new_or_empty(name.into(), sample_shape, elements)?;
        if dataset.is_empty() { Err(Fault::Empty.of(&dataset.name)) } else { Ok(dataset) }
    }

    /// A data set from the bytes of [`into_le_bytes`](Self::into_le_bytes). No bytes give no samples, since
    /// [`select`](Self::select) can have made such a set.
    ///
    /// # Errors
    /// When the bytes are not a whole number of samples, or the elements are not all finite.
    pub fn from_le_bytes(
        name: impl Into<String>,
        sample_shape: Shape,
        dtype: Dtype,
        bytes: impl Into<Vec<u8>>,
    ) -> Result<Self, DataError> {
        let name = name.into();
        let bytes = bytes.into();
        let elements = match dtype {
            Dtype::U8 => Elements::U8(bytes),
            Dtype::F32 => {
                let (elements, rest) = bytes.as_chunks();
                if !rest.is_empty() {
                    let per_sample = sample_elements(&sample_shape).map_err(|fault| fault.of(&name))?;
                    let per_sample = per_sample.saturating_mul(dtype.size_bytes());
                    let fault =
                        Fault::NotWhole { found: bytes.len(), per_sample, unit: "bytes", shape: sample_shape.clone() };
                    return Err(fault.of(&name));
                }
                Elements::F32(elements.iter().copied().map(f32::from_le_bytes).collect())
            }
        };
        Self::new_or_empty(name, sample_shape, elements)
    }

    fn new_or_empty(name: String, sample_shape: Shape, elements: Elements) -> Result<Self, DataError> {
        match check(&sample_shape, &elements) {
            Ok(sample_elements) => Ok(Self { name, sample_shape, sample_elements, elements }),
            Err(fault) => Err(fault.of(&name)),
        }
    }

    /// What the data set is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The shape of a sample.
    pub fn sample_shape(&self) -> &Shape {
        &self.sample_shape
    }

    /// The number of elements of a sample.
    pub fn sample_elements(&self) -> usize {
        self.sample_elements
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.elements.dtype()
    }

    /// The number of samples; it fits in a `u32`.
    pub fn len(&self) -> usize {
        self.elements.len() / self.sample_elements
    }

    /// Whether there are no samples, as only [`select`](Self::select), [`split_tail`](Self::split_tail) and
    /// [`from_le_bytes`](Self::from_le_bytes) can give.
    pub fn is_empty(&self) -> bool {
        self.elements.is_empty()
    }

    /// The elements of all samples: (samples, ...sample shape).
    pub fn elements(&self) -> &Elements {
        &self.elements
    }

    /// The elements of sample `index`.
    ///
    /// # Panics
    /// When there is no such sample.
    pub fn sample(&self, index: usize) -> SampleView<'_> {
        let range = index * self.sample_elements..(index + 1) * self.sample_elements;
        match &self.elements {
            Elements::U8(elements) => SampleView::U8(&elements[range]),
            Elements::F32(elements) => SampleView::F32(&elements[range]),
        }
    }

    /// A new data set of copies of the samples with the given indices, in the given order.
    ///
    /// # Panics
    /// When there is no such sample.
    pub fn select(&self, indices: &[u32]) -> Self {
        let elements = match &self.elements {
            Elements::U8(elements) => Elements::U8(gather(elements, self.sample_elements, indices)),
            Elements::F32(elements) => Elements::F32(gather(elements, self.sample_elements, indices)),
        };
        Self { name: self.name.clone(), sample_shape: self.sample_shape.clone(), elements, ..*self }
    }

    /// Cuts off the last `tail_samples` samples: returns what is before them, and them.
    ///
    /// # Panics
    /// When there are fewer samples.
    pub fn split_tail(mut self, tail_samples: usize) -> (Self, Self) {
        let samples = self.len();
        assert!(tail_samples <= samples, "cannot cut {tail_samples} samples off the {samples} of {}", self.name);
        let at = (samples - tail_samples) * self.sample_elements;
        let tail = match &mut self.elements {
            Elements::U8(elements) => Elements::U8(elements.split_off(at)),
            Elements::F32(elements) => Elements::F32(elements.split_off(at)),
        };
        let tail = Self { name: self.name.clone(), sample_shape: self.sample_shape.clone(), elements: tail, ..self };
        (self, tail)
    }

    /// The elements of all samples as little-endian bytes.
    pub fn into_le_bytes(self) -> Vec<u8> {
        match self.elements {
            Elements::U8(elements) => elements,
            Elements::F32(elements) if cfg!(target_endian = "little") => bytemuck::cast_slice(&elements).to_vec(),
            Elements::F32(elements) => elements.iter().flat_map(|element| element.to_le_bytes()).collect(),
        }
    }
}

impl fmt::Debug for Dataset {
    /// Without the elements: there are millions.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dataset({}: {} samples of {} {})", self.name, self.len(), self.sample_shape, self.dtype())
    }
}

/// The number of elements of a sample, at least 1.
fn sample_elements(shape: &Shape) -> Result<usize, Fault> {
    match shape.checked_elements() {
        Some(0) => Err(Fault::ZeroAxis { axes: shape.axes().to_vec() }),
        Some(elements) => Ok(elements),
        None => Err(Fault::TooLarge { axes: shape.axes().to_vec() }),
    }
}

/// Checks that the elements are whole samples, finite, and not too many; returns the number of elements of a sample.
fn check(shape: &Shape, elements: &Elements) -> Result<usize, Fault> {
    let per_sample = sample_elements(shape)?;
    if !elements.len().is_multiple_of(per_sample) {
        return Err(Fault::NotWhole { found: elements.len(), per_sample, unit: "elements", shape: shape.clone() });
    }
    let samples = elements.len() / per_sample;
    if u32::try_from(samples).is_err() {
        return Err(Fault::TooManySamples(samples));
    }
    if let Elements::F32(elements) = elements
        && let Some(at) = elements.iter().position(|element| !element.is_finite())
    {
        return Err(Fault::NotFinite { sample: at / per_sample, element: at % per_sample, value: elements[at] });
    }
    Ok(per_sample)
}

fn gather<T: Copy>(elements: &[T], per_sample: usize, indices: &[u32]) -> Vec<T> {
    let mut gathered = Vec::with_capacity(indices.len() * per_sample);
    for &index in indices {
        let start = index as usize * per_sample;
        gathered.extend_from_slice(&elements[start..start + per_sample]);
    }
    gathered
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes() -> Dataset {
        Dataset::new("bytes", Shape::new([2]), Elements::U8(vec![0, 1, 2, 3, 254, 255])).unwrap()
    }

    fn floats() -> Dataset {
        Dataset::new("floats", Shape::new([1, 2]), Elements::F32(vec![0.5, -1.0, 2.0, -0.0])).unwrap()
    }

    #[test]
    fn what_is_not_whole_samples_of_finite_numbers_is_refused() {
        let check = |axes: &[usize], elements: Elements, expected: &str| {
            let message = Dataset::new("d", Shape::new(axes), elements).unwrap_err().to_string();
            assert_eq!(message, format!("cannot use d: {expected}"));
        };
        check(
            &[2, 2],
            Elements::U8(vec![0; 7]),
            "7 elements are not a whole number of samples of 4 elements (shape 2x2)",
        );
        check(&[2], Elements::U8(vec![]), "there are no samples in it");
        check(&[2, 0], Elements::U8(vec![1]), "its shape is (2, 0): nothing is in it");
        let huge = format!("its shape is ({0}, {0}): more elements than this machine can address", usize::MAX);
        check(&[usize::MAX, usize::MAX], Elements::U8(vec![1]), &huge);
        for (value, word) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            let expected = format!("element 1 of sample 1 is {word} as a 32-bit float; remove or replace such samples");
            check(&[2], Elements::F32(vec![0.0, 0.0, 1.0, value]), &expected);
        }
    }

    #[test]
    fn bytes_become_quotients_by_255_and_floats_stay() {
        for byte in 0..=255u8 {
            let mut out = [f32::NAN];
            SampleView::U8(&[byte]).write_f32(&mut out);
            assert_eq!(out[0].to_bits(), (f32::from(byte) / 255.0).to_bits());
        }
        let mut out = [f32::NAN; 2];
        floats().sample(1).write_f32(&mut out);
        assert_eq!(out.map(f32::to_bits), [2.0f32, -0.0].map(f32::to_bits));
    }

    #[test]
    fn samples_are_selected_in_the_given_order() {
        let selected = bytes().select(&[2, 0, 2]);
        assert_eq!(selected.elements(), &Elements::U8(vec![254, 255, 0, 1, 254, 255]));
        assert_eq!((selected.len(), selected.sample_shape(), selected.name()), (3, &Shape::new([2]), "bytes"));
        assert_eq!(floats().select(&[1]).sample(0), SampleView::F32(&[2.0, -0.0]));
        assert!(bytes().select(&[]).is_empty());
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn selecting_a_sample_that_is_not_there_panics() {
        bytes().select(&[3]);
    }

    #[test]
    fn the_tail_is_cut_off() {
        let (head, tail) = bytes().split_tail(1);
        assert_eq!(head.elements(), &Elements::U8(vec![0, 1, 2, 3]));
        assert_eq!(tail.elements(), &Elements::U8(vec![254, 255]));
        let (head, tail) = floats().split_tail(0);
        assert_eq!((head.len(), tail.len()), (2, 0));
    }

    #[test]
    #[should_panic(expected = "cannot cut 4 samples off the 3 of bytes")]
    fn cutting_off_more_than_there_is_panics() {
        bytes().split_tail(4);
    }

    #[test]
    fn bytes_for_transport_come_back_as_they_were() {
        for dataset in [bytes(), floats(), floats().select(&[])] {
            let (shape, dtype) = (dataset.sample_shape().clone(), dataset.dtype());
            let carried =
                Dataset::from_le_bytes(dataset.name(), shape, dtype, dataset.clone().into_le_bytes()).unwrap();
            assert_eq!(carried, dataset);
        }
        assert_eq!(floats().into_le_bytes()[..4], [0, 0, 0, 0x3f]);
    }

    #[test]
    fn damaged_bytes_from_transport_are_refused() {
        let check = |dtype, bytes: &[u8], expected: &str| {
            let error = Dataset::from_le_bytes("shard 3", Shape::new([2]), dtype, bytes).unwrap_err();
            assert_eq!(error.to_string(), format!("cannot use shard 3: {expected}"));
        };
        let part = "are not a whole number of samples of";
        check(Dtype::U8, &[1], &format!("1 elements {part} 2 elements (shape 2)"));
        check(Dtype::F32, &[0; 9], &format!("9 bytes {part} 8 bytes (shape 2)"));
        check(Dtype::F32, &[0; 12], &format!("3 elements {part} 2 elements (shape 2)"));
        let nan = [[0; 4], f32::NAN.to_le_bytes()].concat();
        check(Dtype::F32, &nan, "element 1 of sample 0 is NaN as a 32-bit float; remove or replace such samples");
    }

    #[test]
    fn names_of_types_are_short() {
        assert_eq!([Dtype::U8, Dtype::F32].map(|dtype| dtype.to_string()), ["u8", "f32"]);
        assert_eq!(format!("{:?}", bytes()), "Dataset(bytes: 3 samples of 2 u8)");
    }
}
