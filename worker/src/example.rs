//! A run for tests.

use std::sync::Arc;

use lockstep_common::config::{DataFacts, RunConfig, RunSpec};
use lockstep_common::data::{Dataset, Dtype, Elements};
use lockstep_common::model;
use lockstep_common::placement::PlacedData;
use lockstep_common::shape::Shape;

const SAMPLES: usize = 1000;

/// Its settings.
pub(crate) fn spec() -> RunSpec {
    spec_of("conv", RunConfig::default().batch_size)
}

/// The same with another preset and batch size.
pub(crate) fn spec_of(preset: &str, batch_size: u32) -> RunSpec {
    let config = RunConfig { name: Some("test".to_owned()), batch_size, ..RunConfig::default() };
    let facts = DataFacts {
        name: "test data".to_owned(),
        sample_shape: Shape::new([28, 28]),
        dtype: Dtype::U8,
        training_samples: SAMPLES as u32,
        validation_samples: 0,
    };
    config.resolve(model::preset(preset).expect("a preset"), &facts).expect("a valid run")
}

/// Its samples: grey ones.
pub(crate) fn data(spec: &RunSpec) -> Arc<PlacedData> {
    let elements = Elements::U8(vec![100; SAMPLES * 28 * 28]);
    let training = Dataset::new("test data", Shape::new([28, 28]), elements).expect("samples");
    Arc::new(PlacedData::new(Arc::new(training), None, spec.schedule))
}
