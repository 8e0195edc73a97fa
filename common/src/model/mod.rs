//! Models as data: what a model is made of, which shapes follow from that, and where its parameters lie.

mod infer;
mod layout;
mod presets;
mod spec;
mod storage;

pub(crate) use infer::paddings_before;
pub use infer::{LayerPlace, ModelError, ResolvedLayer, ResolvedModel, Section};
pub use layout::{Layout, LayoutHash, ParameterEntry};
pub use presets::{PRESETS, UnknownPreset, preset};
pub use spec::{Activation, ConvSpec, LayerSpec, ModelSpec, Padding, Pair, PoolSpec};
pub use storage::{PANEL_COLUMNS, PanelMatrix, Storage, StoredPanel};
