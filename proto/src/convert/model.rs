//! Models. Sizes are taken as they are: which ones fit together is said by `ModelSpec::resolve`.

use lockstep_common::model::{Activation, ConvSpec, LayerSpec, ModelSpec, Padding, Pair, PoolSpec};
use lockstep_common::shape::Shape;

use super::{At, WireEnum, at_most, each, required, size, text, wire_enum};
use crate::limits::{MAX_AXES, MAX_LAYERS};
use crate::v1::{self, layer::Kind};
use crate::wire_error::{Fault, WireError};

wire_enum!(Padding, Valid, Same);
wire_enum!(
    Activation,
    Linear,
    Relu,
    Relu6,
    LeakyRelu,
    Elu,
    Selu,
    Softplus,
    Softsign,
    Sigmoid,
    HardSigmoid,
    Tanh,
    Silu,
    Gelu,
    Mish,
    Exponential,
);

impl From<&Shape> for v1::Shape {
    fn from(shape: &Shape) -> Self {
        Self { axes: shape.axes().iter().map(|&axis| axis as u64).collect() }
    }
}

impl TryFrom<v1::Shape> for Shape {
    type Error = WireError;

    fn try_from(shape: v1::Shape) -> Result<Self, WireError> {
        at_most(shape.axes.len() as u64, MAX_AXES as u64, " axes").at("Shape", "axes")?;
        let axis = |(i, axis): (usize, u64)| {
            let axis = if axis == 0 { Err(Fault::Zero) } else { size(axis) };
            axis.at("Shape", &format!("axes[{i}]"))
        };
        Ok(Self::new(shape.axes.into_iter().enumerate().map(axis).collect::<Result<Vec<usize>, _>>()?))
    }
}

impl From<Pair> for v1::Pair {
    fn from(pair: Pair) -> Self {
        Self { rows: pair.rows as u64, columns: pair.columns as u64 }
    }
}

impl TryFrom<v1::Pair> for Pair {
    type Error = WireError;

    fn try_from(pair: v1::Pair) -> Result<Self, WireError> {
        Ok(Self { rows: size(pair.rows).at("Pair", "rows")?, columns: size(pair.columns).at("Pair", "columns")? })
    }
}

impl From<&ConvSpec> for v1::ConvLayer {
    fn from(conv: &ConvSpec) -> Self {
        Self {
            filters: conv.filters as u64,
            kernel_size: Some(conv.kernel_size.into()),
            strides: Some(conv.strides.into()),
            padding: v1::Padding::from(conv.padding).into(),
            activation: v1::Activation::from(conv.activation).into(),
            use_bias: conv.use_bias,
        }
    }
}

impl TryFrom<v1::ConvLayer> for ConvSpec {
    type Error = WireError;

    fn try_from(conv: v1::ConvLayer) -> Result<Self, WireError> {
        const M: &str = "ConvLayer";
        Ok(Self {
            filters: size(conv.filters).at(M, "filters")?,
            kernel_size: required(M, "kernel_size", conv.kernel_size)?,
            strides: required(M, "strides", conv.strides)?,
            padding: Padding::from_wire(conv.padding).at(M, "padding")?,
            activation: Activation::from_wire(conv.activation).at(M, "activation")?,
            use_bias: conv.use_bias,
        })
    }
}

impl From<&PoolSpec> for v1::PoolLayer {
    fn from(pool: &PoolSpec) -> Self {
        Self {
            pool_size: Some(pool.pool_size.into()),
            strides: pool.strides.map(Into::into),
            padding: v1::Padding::from(pool.padding).into(),
        }
    }
}

impl TryFrom<v1::PoolLayer> for PoolSpec {
    type Error = WireError;

    fn try_from(pool: v1::PoolLayer) -> Result<Self, WireError> {
        const M: &str = "PoolLayer";
        Ok(Self {
            pool_size: required(M, "pool_size", pool.pool_size)?,
            strides: pool.strides.map(Pair::try_from).transpose().map_err(|error| error.within(M, "strides"))?,
            padding: Padding::from_wire(pool.padding).at(M, "padding")?,
        })
    }
}

impl From<&LayerSpec> for v1::Layer {
    fn from(layer: &LayerSpec) -> Self {
        let kind = match layer {
            LayerSpec::Conv2d(conv) => Kind::Conv2d(conv.into()),
            LayerSpec::Conv2dTranspose(conv) => Kind::Conv2dTranspose(conv.into()),
            LayerSpec::MaxPool2d(pool) => Kind::MaxPool2d(pool.into()),
            LayerSpec::AveragePool2d(pool) => Kind::AveragePool2d(pool.into()),
            LayerSpec::UpSampling2d { size } => Kind::UpSampling2d(v1::UpSamplingLayer { size: Some((*size).into()) }),
            LayerSpec::Dense { units, activation, use_bias } => Kind::Dense(v1::DenseLayer {
                units: *units as u64,
                activation: v1::Activation::from(*activation).into(),
                use_bias: *use_bias,
            }),
            LayerSpec::Flatten {} => Kind::Flatten(v1::FlattenLayer {}),
            LayerSpec::Reshape { target_shape } => {
                Kind::Reshape(v1::ReshapeLayer { target_shape: Some(target_shape.into()) })
            }
            LayerSpec::Activation { activation } => {
                Kind::Activation(v1::ActivationLayer { activation: v1::Activation::from(*activation).into() })
            }
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::Layer> for LayerSpec {
    type Error = WireError;

    fn try_from(layer: v1::Layer) -> Result<Self, WireError> {
        const M: &str = "Layer";
        let conv = |field: &str, conv: v1::ConvLayer| ConvSpec::try_from(conv).map_err(|error| error.within(M, field));
        let pool = |field: &str, pool: v1::PoolLayer| PoolSpec::try_from(pool).map_err(|error| error.within(M, field));
        Ok(match layer.kind.ok_or_else(|| WireError::missing(M, "kind"))? {
            Kind::Conv2d(layer) => Self::Conv2d(conv("conv2d", layer)?),
            Kind::Conv2dTranspose(layer) => Self::Conv2dTranspose(conv("conv2d_transpose", layer)?),
            Kind::MaxPool2d(layer) => Self::MaxPool2d(pool("max_pool2d", layer)?),
            Kind::AveragePool2d(layer) => Self::AveragePool2d(pool("average_pool2d", layer)?),
            Kind::UpSampling2d(layer) => Self::UpSampling2d { size: required(M, "up_sampling2d.size", layer.size)? },
            Kind::Dense(layer) => Self::Dense {
                units: size(layer.units).at(M, "dense.units")?,
                activation: Activation::from_wire(layer.activation).at(M, "dense.activation")?,
                use_bias: layer.use_bias,
            },
            Kind::Flatten(v1::FlattenLayer {}) => Self::Flatten {},
            Kind::Reshape(layer) => {
                Self::Reshape { target_shape: required(M, "reshape.target_shape", layer.target_shape)? }
            }
            Kind::Activation(layer) => {
                Self::Activation { activation: Activation::from_wire(layer.activation).at(M, "activation.activation")? }
            }
        })
    }
}

impl From<&ModelSpec> for v1::Model {
    fn from(model: &ModelSpec) -> Self {
        Self {
            name: model.name.clone(),
            input: Some((&model.input).into()),
            encoder: model.encoder.iter().map(Into::into).collect(),
            decoder: model.decoder.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::Model> for ModelSpec {
    type Error = WireError;

    fn try_from(model: v1::Model) -> Result<Self, WireError> {
        const M: &str = "Model";
        let layers = |field: &'static str, layers: Vec<v1::Layer>| {
            at_most(layers.len() as u64, MAX_LAYERS as u64, " layers").at(M, field)?;
            each(M, field, layers)
        };
        Ok(Self {
            name: text(model.name).at(M, "name")?,
            input: required(M, "input", model.input)?,
            encoder: layers("encoder", model.encoder)?,
            decoder: layers("decoder", model.decoder)?,
        })
    }
}
