//! Which part of each image is read: pooling without padding leaves out the last rows and columns of images that its
//! windows do not divide, and what nobody reads need not be computed.

use super::linear::image;
use crate::kernel::contraction::PixelRelation;
use crate::model::{LayerSpec, Pair, ResolvedLayer, ResolvedModel};

/// How much of a layer's input and output is read, from the upper left corner. `None` if they are no images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LiveSizes {
    pub(super) input: Option<Pair>,
    pub(super) output: Option<Pair>,
}

impl LiveSizes {
    /// For each layer of the model.
    ///
    /// The network's input, its output and the code are always whole. So is what a layer makes that sees no neighbours
    /// (dense, reshape), and an image of one channel: the sum over its pixels, a bias' gradient, goes through lanes that
    /// depend on the image's width.
    pub(super) fn of(model: &ResolvedModel) -> Vec<Self> {
        let mut sizes = Vec::with_capacity(model.layers.len());
        let mut read = None;
        for (i, layer) in model.layers.iter().enumerate().rev() {
            let output = image(&layer.output).map(|(whole, channels)| {
                let must_be_whole = channels == 1 || i + 1 == model.encoder_layers || !has_windows(&layer.spec);
                if must_be_whole { whole } else { read.unwrap_or(whole) }
            });
            read = output.and_then(|output| read_by(layer, output));
            sizes.push(Self { input: None, output });
        }
        sizes.reverse();
        // What a layer reads is what the one before writes.
        let mut input = image(model.input_shape()).map(|(whole, _)| whole);
        for (layer, size) in model.layers.iter().zip(&mut sizes) {
            let whole = image(&layer.input).map(|(whole, _)| whole);
            size.input = input.or(whole);
            input = size.output;
        }
        sizes
    }

    /// Elements of a layer's output that are computed for a sample.
    pub(super) fn output_elements(self, layer: &ResolvedLayer) -> usize {
        match (self.output, image(&layer.output)) {
            (Some(live), Some((_, channels))) => live.rows * live.columns * channels,
            _ => layer.output.elements(),
        }
    }

    /// A layer's relation between its whole images, cropped to what is read.
    pub(super) fn crop(self, relation: PixelRelation, output_is_high: bool) -> PixelRelation {
        let (input, output) = (self.input, self.output);
        let (high, low) = if output_is_high { (output, input) } else { (input, output) };
        PixelRelation { high: high.unwrap_or(relation.high), low: low.unwrap_or(relation.low), ..relation }
    }
}

/// Whether a layer computes pixels from windows of pixels, or from one each.
fn has_windows(layer: &LayerSpec) -> bool {
    use LayerSpec::{Activation, AveragePool2d, Conv2d, Conv2dTranspose, MaxPool2d, UpSampling2d};
    matches!(
        layer,
        Conv2d(_) | Conv2dTranspose(_) | MaxPool2d(_) | AveragePool2d(_) | UpSampling2d { .. } | Activation { .. }
    )
}

/// How much of its input a layer reads to compute that much of its output; `None` if that is not known to be less than
/// everything.
fn read_by(layer: &ResolvedLayer, output: Pair) -> Option<Pair> {
    let (input, _) = image(&layer.input)?;
    let (whole, _) = image(&layer.output)?;
    match &layer.spec {
        LayerSpec::Activation { .. } => Some(output),
        LayerSpec::Conv2d(conv) => {
            let relation = PixelRelation::with_padding(input, whole, conv.kernel_size, conv.strides, conv.padding);
            Some(high_reach(&relation, output))
        }
        LayerSpec::MaxPool2d(pool) | LayerSpec::AveragePool2d(pool) => {
            let strides = pool.strides.unwrap_or(pool.pool_size);
            let relation = PixelRelation::with_padding(input, whole, pool.pool_size, strides, pool.padding);
            Some(high_reach(&relation, output))
        }
        LayerSpec::Conv2dTranspose(conv) => {
            let relation = PixelRelation::with_padding(whole, input, conv.kernel_size, conv.strides, conv.padding);
            Some(low_reach(&relation, output))
        }
        LayerSpec::UpSampling2d { size } => {
            Some(Pair { rows: output.rows.div_ceil(size.rows), columns: output.columns.div_ceil(size.columns) })
        }
        _ => None,
    }
}

/// The part of the high image that is connected to that part of the low one.
fn high_reach(relation: &PixelRelation, low: Pair) -> Pair {
    let reach = |low: usize, stride: usize, kernel: usize, padding: usize, high: usize| {
        ((low - 1) * stride + kernel).saturating_sub(padding).clamp(1, high)
    };
    let PixelRelation { high, kernel, strides, padding, .. } = *relation;
    Pair {
        rows: reach(low.rows, strides.rows, kernel.rows, padding.rows, high.rows),
        columns: reach(low.columns, strides.columns, kernel.columns, padding.columns, high.columns),
    }
}

/// The part of the low image that is connected to that part of the high one.
fn low_reach(relation: &PixelRelation, high: Pair) -> Pair {
    let reach =
        |high: usize, stride: usize, padding: usize, low: usize| (high + padding).div_ceil(stride).clamp(1, low);
    let PixelRelation { low, strides, padding, .. } = *relation;
    Pair {
        rows: reach(high.rows, strides.rows, padding.rows, low.rows),
        columns: reach(high.columns, strides.columns, padding.columns, low.columns),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::preset;

    fn outputs(model: &ResolvedModel) -> Vec<Option<(usize, usize)>> {
        let sizes = LiveSizes::of(model);
        for pair in sizes.windows(2) {
            assert!(pair[0].output.is_none() || pair[0].output == pair[1].input, "written, and read by the next layer");
        }
        sizes.iter().map(|size| size.output.map(|size| (size.rows, size.columns))).collect()
    }

    #[test]
    fn windows_that_do_not_divide_an_image_leave_rows_and_columns_unread() {
        let model = preset("article").expect("a preset").resolve().expect("a model");
        let read = [(24, 24), (12, 12), (10, 10), (5, 5), (3, 3), (7, 7), (14, 14), (28, 28)];
        assert_eq!(outputs(&model), read.map(Some), "of 26, 13, 11, 5, 3, 7, 14, 28");
    }

    #[test]
    fn code_output_and_images_of_one_channel_are_whole() {
        let model: crate::model::ModelSpec = toml::from_str(
            r#"
            name = "ragged"
            input = [11, 11, 2]
            encoder = [
                { layer = "conv2d", filters = 1, kernel_size = 3, padding = "same" },
                { layer = "average_pool2d", pool_size = 2 },
                { layer = "conv2d", filters = 3, kernel_size = 2, padding = "same" },
            ]
            decoder = [
                { layer = "conv2d_transpose", filters = 4, kernel_size = 3, strides = 3, padding = "same" },
                { layer = "max_pool2d", pool_size = 4 },
                { layer = "up_sampling2d", size = 4 },
                { layer = "conv2d", filters = 2, kernel_size = 2 },
            ]
            "#,
        )
        .expect("a model file");
        let model = model.resolve().expect("a model");
        let read = [(11, 11), (5, 5), (5, 5), (12, 12), (3, 3), (12, 12), (11, 11)];
        assert_eq!(outputs(&model), read.map(Some), "the transposed convolution's whole output is 15 by 15");
    }
}
