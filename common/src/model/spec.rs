//! The vocabulary of a model file: Keras' layer names, arguments and defaults.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::shape::Shape;

/// An autoencoder: two lists of layers. The decoder's output must have the shape of the encoder's input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// A name for messages and files.
    pub name: String,
    /// Shape of one sample: `[features]` or `[height, width, channels]`.
    pub input: Shape,
    /// From the input to the code.
    pub encoder: Vec<LayerSpec>,
    /// From the code to the reconstruction.
    pub decoder: Vec<LayerSpec>,
}

impl ModelSpec {
    /// Reads a model from TOML text.
    ///
    /// # Errors
    /// The parser's message, with line and column, when the text is not a model.
    pub fn from_toml(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// The model as TOML text, with every default written out.
    ///
    /// # Errors
    /// When a size does not fit TOML's 64-bit signed integers.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }
}

/// One layer with its arguments. Images are (height, width, channels); sizes are given as one number or as a pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "layer", rename_all = "snake_case", deny_unknown_fields)]
pub enum LayerSpec {
    /// Cross-correlation. Kernel: (kernel height, kernel width, channels in, filters).
    #[serde(rename = "conv2d")]
    Conv2d(ConvSpec),
    /// The adjoint of `conv2d`. Kernel: (kernel height, kernel width, filters, channels in).
    #[serde(rename = "conv2d_transpose")]
    Conv2dTranspose(ConvSpec),
    /// The largest value of each window. Padding never wins.
    #[serde(rename = "max_pool2d")]
    MaxPool2d(PoolSpec),
    /// The mean of each window's values; padding is not counted.
    #[serde(rename = "average_pool2d")]
    AveragePool2d(PoolSpec),
    /// Repeats every row and column (nearest neighbour).
    #[serde(rename = "up_sampling2d")]
    UpSampling2d {
        /// How often rows and columns are repeated.
        #[serde(default = "Pair::two")]
        size: Pair,
    },
    /// A matrix product over the last axis. Kernel: (features in, units).
    Dense {
        /// Size of the last axis of the output.
        units: usize,
        /// Applied to the output.
        #[serde(default)]
        activation: Activation,
        /// Whether a bias is added.
        #[serde(default = "yes")]
        use_bias: bool,
    },
    /// All axes as one.
    Flatten {},
    /// The same elements under another shape.
    Reshape {
        /// The new shape, without the batch axis.
        target_shape: Shape,
    },
    /// An activation as a layer of its own.
    Activation {
        /// Which one.
        activation: Activation,
    },
}

/// Arguments of a convolution or a transposed convolution.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConvSpec {
    /// Number of output channels.
    pub filters: usize,
    /// Height and width of the kernel.
    pub kernel_size: Pair,
    /// Step of the window, down and across.
    #[serde(default = "Pair::one")]
    pub strides: Pair,
    /// What happens at the border.
    #[serde(default)]
    pub padding: Padding,
    /// Applied to the output.
    #[serde(default)]
    pub activation: Activation,
    /// Whether a bias is added.
    #[serde(default = "yes")]
    pub use_bias: bool,
}

/// Arguments of a pooling layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolSpec {
    /// Height and width of the window.
    #[serde(default = "Pair::two")]
    pub pool_size: Pair,
    /// Step of the window; the window's size when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strides: Option<Pair>,
    /// What happens at the border.
    #[serde(default)]
    pub padding: Padding,
}

fn yes() -> bool {
    true
}

impl LayerSpec {
    /// The name under which the layer stands in model files, tables and parameter names.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Conv2d(_) => "conv2d",
            Self::Conv2dTranspose(_) => "conv2d_transpose",
            Self::MaxPool2d(_) => "max_pool2d",
            Self::AveragePool2d(_) => "average_pool2d",
            Self::UpSampling2d { .. } => "up_sampling2d",
            Self::Dense { .. } => "dense",
            Self::Flatten {} => "flatten",
            Self::Reshape { .. } => "reshape",
            Self::Activation { .. } => "activation",
        }
    }

    /// What the layer does, in a few words, for the table of `lockstep model check`.
    pub fn describe(&self) -> String {
        fn biased(use_bias: bool) -> &'static str {
            if use_bias { "" } else { ", no bias" }
        }
        match self {
            Self::Conv2d(conv) | Self::Conv2dTranspose(conv) => format!(
                "{} filters {}, stride {}, {}, {}{}",
                conv.filters,
                conv.kernel_size,
                conv.strides,
                conv.padding,
                conv.activation,
                biased(conv.use_bias)
            ),
            Self::MaxPool2d(pool) | Self::AveragePool2d(pool) => {
                format!(
                    "window {}, stride {}, {}",
                    pool.pool_size,
                    pool.strides.unwrap_or(pool.pool_size),
                    pool.padding
                )
            }
            Self::UpSampling2d { size } => format!("times {size}"),
            Self::Dense { units, activation, use_bias } => format!("{units} units, {activation}{}", biased(*use_bias)),
            Self::Flatten {} => String::new(),
            Self::Reshape { target_shape } => format!("to {target_shape}"),
            Self::Activation { activation } => activation.to_string(),
        }
    }
}

/// Sizes down (rows) and across (columns).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "OneOrTwo", into = "OneOrTwo")]
pub struct Pair {
    /// Down.
    pub rows: usize,
    /// Across.
    pub columns: usize,
}

impl Pair {
    /// The same size both ways.
    pub const fn square(size: usize) -> Self {
        Self { rows: size, columns: size }
    }

    fn one() -> Self {
        Self::square(1)
    }

    fn two() -> Self {
        Self::square(2)
    }
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.rows, self.columns)
    }
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(untagged)]
enum OneOrTwo {
    One(usize),
    Two([usize; 2]),
}

impl From<OneOrTwo> for Pair {
    fn from(sizes: OneOrTwo) -> Self {
        match sizes {
            OneOrTwo::One(size) => Self::square(size),
            OneOrTwo::Two([rows, columns]) => Self { rows, columns },
        }
    }
}

impl From<Pair> for OneOrTwo {
    fn from(pair: Pair) -> Self {
        if pair.rows == pair.columns { Self::One(pair.rows) } else { Self::Two([pair.rows, pair.columns]) }
    }
}

/// What happens at the border of an image; Keras' meaning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Padding {
    /// Windows lie wholly inside the image; what is left over at the far border is dropped.
    #[default]
    Valid,
    /// The output has `ceil(input / stride)` rows (`input * stride` for a transposed convolution); the smaller half of
    /// an odd padding comes first.
    Same,
}

impl fmt::Display for Padding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Valid => "valid",
            Self::Same => "same",
        })
    }
}

/// An elementwise function, with Keras' names and constants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x`
    #[default]
    Linear,
    /// `max(x, 0)`
    Relu,
    /// `min(max(x, 0), 6)`
    Relu6,
    /// `x` above zero, `0.2 x` below
    LeakyRelu,
    /// `x` above zero, `exp(x) - 1` below
    Elu,
    /// `scale * elu` with self-normalising constants (Klambauer et al. 2017)
    Selu,
    /// `ln(1 + exp(x))`
    Softplus,
    /// `x / (1 + |x|)`
    Softsign,
    /// `1 / (1 + exp(-x))`
    Sigmoid,
    /// `relu6(x + 3) / 6`
    HardSigmoid,
    /// `tanh(x)`
    Tanh,
    /// `x * sigmoid(x)`
    Silu,
    /// `x * (1 + erf(x / sqrt(2))) / 2`
    Gelu,
    /// `x * tanh(softplus(x))`
    Mish,
    /// `exp(x)`
    Exponential,
}

impl Activation {
    /// Every activation, in the order of the model vocabulary.
    pub const ALL: [Activation; 15] = [
        Self::Linear,
        Self::Relu,
        Self::Relu6,
        Self::LeakyRelu,
        Self::Elu,
        Self::Selu,
        Self::Softplus,
        Self::Softsign,
        Self::Sigmoid,
        Self::HardSigmoid,
        Self::Tanh,
        Self::Silu,
        Self::Gelu,
        Self::Mish,
        Self::Exponential,
    ];

    /// The name in model files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Relu => "relu",
            Self::Relu6 => "relu6",
            Self::LeakyRelu => "leaky_relu",
            Self::Elu => "elu",
            Self::Selu => "selu",
            Self::Softplus => "softplus",
            Self::Softsign => "softsign",
            Self::Sigmoid => "sigmoid",
            Self::HardSigmoid => "hard_sigmoid",
            Self::Tanh => "tanh",
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::Mish => "mish",
            Self::Exponential => "exponential",
        }
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
