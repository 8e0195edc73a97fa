//! Shape inference: from a [`ModelSpec`] to layers whose shapes are known to fit together.

use std::fmt;

use super::layout::Layout;
use super::spec::{LayerSpec, ModelSpec, Padding, Pair};
use super::storage::Storage;
use crate::shape::Shape;

/// No layer may have more elements than this: 2^28 floats are 1 GiB a sample, and offsets stay far below 2^31, so that
/// index plans can hold them in 32 bits.
const MAX_ELEMENTS: usize = 1 << 28;

/// Which half of the autoencoder a layer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// From the input to the code.
    Encoder,
    /// From the code to the reconstruction.
    Decoder,
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Encoder => "encoder",
            Self::Decoder => "decoder",
        })
    }
}

/// Where a layer stands: `decoder.2`, and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerPlace {
    /// Encoder or decoder.
    pub section: Section,
    /// Position in that list, from 0.
    pub index: usize,
    /// The layer's kind, as in model files.
    pub kind: &'static str,
}

impl fmt::Display for LayerPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.section, self.index, self.kind)
    }
}

/// A layer with the shapes that flow through it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedLayer {
    /// Where it stands.
    pub place: LayerPlace,
    /// Its arguments.
    pub spec: LayerSpec,
    /// Shape of one sample coming in.
    pub input: Shape,
    /// Shape of one sample going out.
    pub output: Shape,
    /// Number of parameters: kernel and bias.
    pub parameters: usize,
}

impl ResolvedLayer {
    /// Positions of an input sample that meet the same weights in a dense layer: all axes but the last.
    pub fn positions(&self) -> usize {
        self.input.axes().split_last().map_or(1, |(_, leading)| leading.iter().product())
    }
}

/// A model whose layers fit together and whose output has the shape of its input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedModel {
    /// What it was resolved from.
    pub spec: ModelSpec,
    /// Encoder, then decoder.
    pub layers: Vec<ResolvedLayer>,
    /// How many of `layers` are the encoder's.
    pub encoder_layers: usize,
    /// Where each parameter lies in the flat vector.
    pub layout: Layout,
}

impl ResolvedModel {
    /// Shape of one sample of the input, and of its reconstruction.
    pub fn input_shape(&self) -> &Shape {
        &self.spec.input
    }

    /// Whether all layers with weights are dense, and none of the others needs neighbouring pixels.
    pub fn is_dense(&self) -> bool {
        is_dense(&self.layers)
    }

    /// Shape of one sample's code.
    pub fn code_shape(&self) -> &Shape {
        match self.encoder_layers {
            0 => &self.spec.input,
            n => &self.layers[n - 1].output,
        }
    }
}

/// Why a model cannot be built. Messages hold the table of the layers up to the one that failed.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A layer cannot take what the layer before it gives.
    #[error("model {model:?}: layer {place}: {reason}\n\n{table}")]
    Layer {
        /// The model's name.
        model: String,
        /// The layer that failed.
        place: LayerPlace,
        /// What does not fit, with its numbers.
        reason: String,
        /// The layers that were resolved before it.
        table: String,
    },
    /// The reconstruction has another shape than the input.
    #[error(
        "model {model:?}: the decoder ends in {output}, but the input is {input}: an autoencoder must end in the shape it starts from\n\n{table}"
    )]
    OutputShape {
        /// The model's name.
        model: String,
        /// Shape of the model's input.
        input: Shape,
        /// Shape in which the decoder ends.
        output: Shape,
        /// Every layer's shape.
        table: String,
    },
    /// Nothing to train, or no input.
    #[error("model {model:?}: {reason}")]
    Empty {
        /// The model's name.
        model: String,
        /// What is missing.
        reason: String,
    },
}

impl ModelSpec {
    /// Infers every layer's shape and the parameters' layout.
    ///
    /// # Errors
    /// [`ModelError`] when a layer does not fit its input, the decoder does not end in the input's shape, or there is
    /// nothing to train.
    pub fn resolve(&self) -> Result<ResolvedModel, ModelError> {
        let empty = |reason: &str| ModelError::Empty { model: self.name.clone(), reason: reason.to_owned() };
        let axes = self.input.axes();
        if axes.is_empty() || axes.len() > 3 || axes.contains(&0) {
            return Err(empty(&format!(
                "input has shape [{}]; it must be [features] or [height, width, channels], each at least 1",
                self.input
            )));
        }
        if self.input.checked_elements().is_none_or(|n| n > MAX_ELEMENTS) {
            return Err(empty(&format!("input {} has more than {MAX_ELEMENTS} elements", self.input)));
        }
        let mut layers: Vec<ResolvedLayer> = Vec::with_capacity(self.encoder.len() + self.decoder.len());
        let mut entries: Vec<(String, Vec<usize>)> = Vec::new();
        let mut shape = self.input.clone();
        for (section, specs) in [(Section::Encoder, &self.encoder), (Section::Decoder, &self.decoder)] {
            for (index, spec) in specs.iter().enumerate() {
                let place = LayerPlace { section, index, kind: spec.kind() };
                let flow = flow(spec, &shape).map_err(|reason| ModelError::Layer {
                    model: self.name.clone(),
                    place: place.clone(),
                    reason,
                    table: table(&self.input, &layers),
                })?;
                let mut parameters = 0;
                if let Some(kernel) = flow.kernel {
                    parameters += kernel.iter().product::<usize>();
                    entries.push((format!("{place}.kernel"), kernel));
                }
                if let Some(bias) = flow.bias {
                    parameters += bias;
                    entries.push((format!("{place}.bias"), vec![bias]));
                }
                let input = std::mem::replace(&mut shape, flow.output);
                layers.push(ResolvedLayer { place, spec: spec.clone(), input, output: shape.clone(), parameters });
            }
        }
        if shape != self.input {
            let table = table(&self.input, &layers);
            return Err(ModelError::OutputShape {
                model: self.name.clone(),
                input: self.input.clone(),
                output: shape,
                table,
            });
        }
        if entries.is_empty() {
            return Err(empty("no layer has parameters, so there is nothing to train"));
        }
        let layout = Layout::new(entries, if is_dense(&layers) { Storage::Panels } else { Storage::Rows });
        Ok(ResolvedModel { spec: self.clone(), encoder_layers: self.encoder.len(), layers, layout })
    }
}

fn is_dense(layers: &[ResolvedLayer]) -> bool {
    layers.iter().all(|layer| match &layer.spec {
        // A single channel's bias gradient over many pixels is summed in lanes, an order of its own.
        LayerSpec::Dense { units, use_bias, .. } => layer.positions() == 1 || *units > 1 || !use_bias,
        LayerSpec::Flatten {} | LayerSpec::Reshape { .. } | LayerSpec::Activation { .. } => true,
        _ => false,
    })
}

/// What a layer makes of its input: the output's shape and the shapes of its parameters.
struct Flow {
    output: Shape,
    kernel: Option<Vec<usize>>,
    bias: Option<usize>,
}

fn flow(spec: &LayerSpec, input: &Shape) -> Result<Flow, String> {
    let flow = match spec {
        LayerSpec::Conv2d(conv) => {
            let (height, width, channels) = image(input)?;
            positive(&[("filters", conv.filters)])?;
            let rows = conv_output(height, conv.kernel_size.rows, conv.strides.rows, conv.padding)?;
            let columns = conv_output(width, conv.kernel_size.columns, conv.strides.columns, conv.padding)?;
            Flow {
                output: Shape::new([rows, columns, conv.filters]),
                kernel: Some(vec![conv.kernel_size.rows, conv.kernel_size.columns, channels, conv.filters]),
                bias: conv.use_bias.then_some(conv.filters),
            }
        }
        LayerSpec::Conv2dTranspose(conv) => {
            let (height, width, channels) = image(input)?;
            positive(&[("filters", conv.filters)])?;
            let rows = transposed_output(height, conv.kernel_size.rows, conv.strides.rows, conv.padding)?;
            let columns = transposed_output(width, conv.kernel_size.columns, conv.strides.columns, conv.padding)?;
            Flow {
                output: Shape::new([rows, columns, conv.filters]),
                kernel: Some(vec![conv.kernel_size.rows, conv.kernel_size.columns, conv.filters, channels]),
                bias: conv.use_bias.then_some(conv.filters),
            }
        }
        LayerSpec::MaxPool2d(pool) | LayerSpec::AveragePool2d(pool) => {
            let (height, width, channels) = image(input)?;
            let strides = pool.strides.unwrap_or(pool.pool_size);
            let rows = conv_output(height, pool.pool_size.rows, strides.rows, pool.padding)?;
            let columns = conv_output(width, pool.pool_size.columns, strides.columns, pool.padding)?;
            unparametrised(Shape::new([rows, columns, channels]))
        }
        LayerSpec::UpSampling2d { size } => {
            let (height, width, channels) = image(input)?;
            positive(&[("size", size.rows), ("size", size.columns)])?;
            let product = |a: usize, b: usize| a.checked_mul(b).ok_or_else(|| format!("size {size} is too large"));
            unparametrised(Shape::new([product(height, size.rows)?, product(width, size.columns)?, channels]))
        }
        LayerSpec::Dense { units, use_bias, .. } => {
            positive(&[("units", *units)])?;
            let (&features, leading) = input.axes().split_last().ok_or("the input has no axis")?;
            let mut output = leading.to_vec();
            output.push(*units);
            Flow { output: Shape::new(output), kernel: Some(vec![features, *units]), bias: use_bias.then_some(*units) }
        }
        LayerSpec::Flatten {} => unparametrised(Shape::new([input.elements()])),
        LayerSpec::Reshape { target_shape } => {
            if target_shape.axes().contains(&0) || target_shape.checked_elements() != Some(input.elements()) {
                return Err(format!(
                    "cannot reshape {input} ({} elements) to {target_shape}: the number of elements differs",
                    input.elements()
                ));
            }
            unparametrised(target_shape.clone())
        }
        LayerSpec::Activation { .. } => unparametrised(input.clone()),
    };
    let sizes = [Some(flow.output.clone()), flow.kernel.clone().map(Shape::new)];
    for shape in sizes.iter().flatten() {
        if shape.checked_elements().is_none_or(|n| n > MAX_ELEMENTS) {
            return Err(format!("a tensor of {shape} has more than {MAX_ELEMENTS} elements"));
        }
    }
    Ok(flow)
}

fn unparametrised(output: Shape) -> Flow {
    Flow { output, kernel: None, bias: None }
}

fn image(input: &Shape) -> Result<(usize, usize, usize), String> {
    input.as_image().ok_or_else(|| {
        format!("takes an image (height, width, channels), but its input has shape {input}; put a reshape before it")
    })
}

fn positive(arguments: &[(&str, usize)]) -> Result<(), String> {
    match arguments.iter().find(|(_, value)| *value == 0 || *value > MAX_ELEMENTS) {
        Some((name, value)) => Err(format!("{name} is {value}; it must be from 1 to {MAX_ELEMENTS}")),
        None => Ok(()),
    }
}

/// Output size of a convolution or pooling along one axis.
/// Source: Keras, `compute_conv_output_shape`.
fn conv_output(size: usize, kernel: usize, stride: usize, padding: Padding) -> Result<usize, String> {
    positive(&[("the window", kernel), ("stride", stride)])?;
    match padding {
        Padding::Same => Ok(size.div_ceil(stride)),
        Padding::Valid if kernel <= size => Ok((size - kernel) / stride + 1),
        Padding::Valid => Err(format!("a window of {kernel} does not fit into {size} with padding `valid`")),
    }
}

/// Output size of a transposed convolution along one axis.
/// Source: Keras, `compute_conv_transpose_output_shape`.
fn transposed_output(size: usize, kernel: usize, stride: usize, padding: Padding) -> Result<usize, String> {
    positive(&[("the window", kernel), ("stride", stride)])?;
    let output = size.checked_mul(stride).and_then(|product| match padding {
        Padding::Same => Some(product),
        Padding::Valid => product.checked_add(kernel.saturating_sub(stride)),
    });
    output.ok_or_else(|| format!("stride {stride} on {size} is too large"))
}

/// Rows or columns of padding before the first pixel, for a window that relates `low` positions to `high` ones by
/// `high = low * stride + tap - padding`.
/// Source: TensorFlow, "SAME" padding: the total is `max((low - 1) * stride + kernel - high, 0)`, the smaller half first.
pub(crate) fn padding_before(high: usize, low: usize, kernel: usize, stride: usize, padding: Padding) -> usize {
    match padding {
        Padding::Valid => 0,
        Padding::Same => (low.saturating_sub(1) * stride + kernel).saturating_sub(high) / 2,
    }
}

/// (rows, columns) of padding before the first pixel; see [`padding_before`].
pub(crate) fn paddings_before(high: Pair, low: Pair, kernel: Pair, strides: Pair, padding: Padding) -> Pair {
    Pair {
        rows: padding_before(high.rows, low.rows, kernel.rows, strides.rows, padding),
        columns: padding_before(high.columns, low.columns, kernel.columns, strides.columns, padding),
    }
}

/// The table of layers, shapes and parameters that `lockstep model check` prints.
fn table(input: &Shape, layers: &[ResolvedLayer]) -> String {
    let mut rows = vec![["layer", "output shape", "parameters", ""].map(str::to_owned)];
    rows.push(["input".into(), input.to_string(), String::new(), String::new()]);
    for layer in layers {
        let parameters = if layer.parameters == 0 { String::new() } else { layer.parameters.to_string() };
        rows.push([layer.place.to_string(), layer.output.to_string(), parameters, layer.spec.describe()]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (place, shape, parameters) = (width(0), width(1), width(2));
    let lines: Vec<String> = rows
        .iter()
        .map(|row| format!("  {:place$}  {:shape$}  {:>parameters$}  {}", row[0], row[1], row[2], row[3]))
        .map(|line| line.trim_end().to_owned())
        .collect();
    lines.join("\n")
}

impl fmt::Display for ResolvedModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", table(&self.spec.input, &self.layers))?;
        let code = self.code_shape();
        write!(
            f,
            "\n  {} parameters; code {code} ({} values for {} inputs); layout {}",
            self.layout.parameters(),
            code.elements(),
            self.spec.input.elements(),
            self.layout.hash()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::preset;

    /// The article's own decoder: 32-64-64 encoder as in `article`, transposed convolutions 64, 32 and 3 wide.
    const UNCORRECTED_ARTICLE: &str = include_str!("../../tests/models/article-uncorrected.toml");

    #[test]
    fn presets_have_the_shapes_of_the_study() {
        let article = preset("article").unwrap().resolve().unwrap();
        assert_eq!(article.code_shape(), &Shape::new([3, 3, 64]));
        assert_eq!(article.layout.parameters(), 320 + 18_496 + 36_928 * 3 + 577);
        let dense = preset("dense").unwrap().resolve().unwrap();
        assert_eq!(dense.code_shape(), &Shape::new([64]));
        assert_eq!(preset("conv").unwrap().resolve().unwrap().code_shape().elements(), 64);
        assert_eq!(preset("wide").unwrap().resolve().unwrap().code_shape().elements(), 128);
    }

    #[test]
    fn the_uncorrected_article_is_refused_with_its_table() {
        let error = ModelSpec::from_toml(UNCORRECTED_ARTICLE).unwrap().resolve().unwrap_err();
        let message = error.to_string();
        assert!(message.contains("ends in 12x12x3, but the input is 28x28x1"), "{message}");
        assert!(message.contains("decoder.2.conv2d_transpose  12x12x3"), "{message}");
    }

    #[test]
    fn a_layer_that_does_not_fit_names_itself_and_its_numbers() {
        fn check(layer: &str, expected: &str) {
            let text = format!("name = 'm'\ninput = [4, 4, 1]\ndecoder = []\n[[encoder]]\n{layer}");
            let message = ModelSpec::from_toml(&text).unwrap().resolve().unwrap_err().to_string();
            assert!(message.contains("encoder.0.") && message.contains(expected), "{message}");
        }
        check("layer='conv2d'\nfilters=2\nkernel_size=5", "a window of 5 does not fit into 4");
        check("layer='conv2d'\nfilters=0\nkernel_size=3", "filters is 0");
        check("layer='conv2d'\nfilters=1\nkernel_size=3\nstrides=0", "stride is 0");
        check("layer='reshape'\ntarget_shape=[3,5]", "cannot reshape 4x4x1 (16 elements) to 3x5");
        check("layer='dense'\nunits=400000000", "units is 400000000");
        check("layer='up_sampling2d'\nsize=100000", "has more than");
    }

    #[test]
    fn unknown_words_in_a_model_file_are_refused() {
        let text = "name='m'\ninput=[4]\ndecoder=[]\n[[encoder]]\nlayer='dense'\nunits=4\nactivaton='relu'";
        assert!(ModelSpec::from_toml(text).unwrap_err().to_string().contains("activaton"));
    }
}
