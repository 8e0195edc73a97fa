//! The shape of one sample or of one layer's output, without the batch axis.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Sizes of the axes, outermost first: `[features]` or `[height, width, channels]`.
///
/// The batch axis is never part of a shape: a leaf's size is a property of the schedule, not of the model.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Shape(Vec<usize>);

impl Shape {
    /// A shape from its axes. An empty list is a scalar with one element.
    pub fn new(axes: impl Into<Vec<usize>>) -> Self {
        Self(axes.into())
    }

    /// The sizes of the axes.
    pub fn axes(&self) -> &[usize] {
        &self.0
    }

    /// The number of elements, or `None` when it does not fit in a `usize`.
    pub fn checked_elements(&self) -> Option<usize> {
        self.0.iter().try_fold(1usize, |product, &axis| product.checked_mul(axis))
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.0.iter().product()
    }

    /// The axes as (height, width, channels), if there are three.
    pub fn as_image(&self) -> Option<(usize, usize, usize)> {
        match self.0[..] {
            [height, width, channels] => Some((height, width, channels)),
            _ => None,
        }
    }

    /// Whether samples of this shape can be fed to a model whose input has shape `input`: the shapes are equal up to
    /// a trailing axis of one (a grey image), or the input is flat and has as many elements.
    pub fn feeds(&self, input: &Shape) -> bool {
        let trimmed = |shape: &Shape| match shape.0[..] {
            [ref head @ .., 1] if !head.is_empty() => head.to_vec(),
            ref all => all.to_vec(),
        };
        trimmed(self) == trimmed(input) || (input.0.len() == 1 && self.elements() == input.elements())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axes: Vec<String> = self.0.iter().map(usize::to_string).collect();
        f.write_str(&axes.join("x"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grey_images_feed_models_with_or_without_a_channel_axis() {
        let flat = Shape::new([784]);
        let grey = Shape::new([28, 28]);
        let image = Shape::new([28, 28, 1]);
        assert!(grey.feeds(&image) && image.feeds(&grey) && grey.feeds(&flat) && image.feeds(&flat));
        assert!(!flat.feeds(&image), "a flat sample does not say where its rows end");
        assert!(!Shape::new([28, 29]).feeds(&image));
    }
}
