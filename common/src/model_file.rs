//! Trained models as safetensors files: the weights by name, and in the metadata all that inference needs.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::files;
use crate::model::{Layout, ModelError, ModelSpec, ResolvedModel};

/// Metadata keys.
const KEY_MODEL: &str = "lockstep_model";
const KEY_VERSION: &str = "lockstep_version";
const KEY_SHA256: &str = "params_sha256";
const KEY_ROUNDS: &str = "rounds";
const KEY_LOSS: &str = "loss";

/// A model with its weights.
#[derive(Clone, Debug)]
pub struct TrainedModel {
    /// The model.
    pub model: ResolvedModel,
    /// The flat vector, in the layout's order.
    pub parameters: Vec<f32>,
    /// Name of the loss that it was trained on.
    pub loss: String,
    /// Rounds that it was trained for.
    pub rounds: u64,
}

/// Why a file holds no usable weights.
#[derive(Debug, thiserror::Error)]
pub enum ModelFileError {
    /// The file could not be read or written.
    #[error("cannot {action} {path}: {cause}", path = path.display())]
    Io {
        /// `read` or `write`.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        cause: io::Error,
    },
    /// The file is not safetensors.
    #[error("{path} is not a safetensors file: {reason}", path = path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// The reader's message.
        reason: String,
    },
    /// The file lacks what Lockstep writes beside the weights.
    #[error(
        "{path} has no {key:?} in its metadata: it was not written by lockstep (weights alone can start a run: --init-from)",
        path = path.display()
    )]
    Metadata {
        /// Which file.
        path: PathBuf,
        /// The missing key.
        key: &'static str,
    },
    /// The model in the metadata does not resolve.
    #[error("the model in {path}: {cause}", path = path.display())]
    Model {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        cause: Box<ModelError>,
    },
    /// A tensor is missing or has another shape or type.
    #[error("{path}: {reason}", path = path.display())]
    Tensor {
        /// Which file.
        path: PathBuf,
        /// The tensor, what was found and what was expected.
        reason: String,
    },
}

impl TrainedModel {
    /// Writes the model; what was at `path` is replaced as a whole.
    ///
    /// # Errors
    /// [`ModelFileError::Io`] when the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), ModelFileError> {
        let write_error = |cause| ModelFileError::Io { action: "write", path: path.to_owned(), cause };
        let model = self.model.spec.to_toml().map_err(|error| write_error(io::Error::other(error)))?;
        let metadata = HashMap::from([
            (KEY_MODEL.to_owned(), model),
            (KEY_VERSION.to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            (KEY_SHA256.to_owned(), self.model.layout.sha256(&self.parameters)),
            (KEY_ROUNDS.to_owned(), self.rounds.to_string()),
            (KEY_LOSS.to_owned(), self.loss.clone()),
            ("preprocessing".to_owned(), "u8 values are divided by 255, f32 values are used as they are".to_owned()),
        ]);
        let layout = &self.model.layout;
        let bytes: Vec<u8> = layout.tensors(&self.parameters).into_iter().flat_map(f32::to_le_bytes).collect();
        let views = layout.entries().iter().map(|entry| {
            let bytes = &bytes[entry.range.start * 4..entry.range.end * 4];
            let view = TensorView::new(Dtype::F32, entry.shape.clone(), bytes);
            (entry.name.as_str(), view.expect("an entry's shape has as many elements as its range"))
        });
        let file =
            safetensors::serialize(views, Some(metadata)).map_err(|error| write_error(io::Error::other(error)))?;
        files::replace(path, |out| out.write_all(&file)).map_err(write_error)
    }

    /// Reads a model that [`TrainedModel::save`] wrote.
    ///
    /// # Errors
    /// [`ModelFileError`] says what is missing or does not fit.
    pub fn load(path: &Path) -> Result<Self, ModelFileError> {
        Self::parse(path, &read(path)?)
    }

    /// Reads the bytes of such a file; `path` is for messages.
    ///
    /// # Errors
    /// As [`TrainedModel::load`].
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, ModelFileError> {
        let format = |reason: String| ModelFileError::Format { path: path.to_owned(), reason };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| format(error.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let get = |key: &'static str| metadata.get(key).ok_or(ModelFileError::Metadata { path: path.to_owned(), key });
        let spec = ModelSpec::from_toml(get(KEY_MODEL)?).map_err(|error| format(error.to_string()))?;
        let model =
            spec.resolve().map_err(|cause| ModelFileError::Model { path: path.to_owned(), cause: Box::new(cause) })?;
        let parameters = parameters_from(path, bytes, &model.layout)?;
        let expected = get(KEY_SHA256)?;
        let found = model.layout.sha256(&parameters);
        if *expected != found {
            let reason =
                format!("the weights' SHA-256 is {found}, but the metadata says {expected}: the file is damaged");
            return Err(ModelFileError::Tensor { path: path.to_owned(), reason });
        }
        let rounds = get(KEY_ROUNDS)?.parse().map_err(|error| format(format!("{KEY_ROUNDS}: {error}")))?;
        Ok(Self { model, parameters, loss: get(KEY_LOSS)?.clone(), rounds })
    }
}

/// Reads the weights of a safetensors file, written by whomever, into the order of `layout`. Tensors are found by name
/// and must have the layout's shapes and 32-bit floats; others are ignored.
///
/// # Errors
/// [`ModelFileError`] names the tensor that is missing or does not fit.
pub fn load_parameters(path: &Path, layout: &Layout) -> Result<Vec<f32>, ModelFileError> {
    parameters_from(path, &read(path)?, layout)
}

fn read(path: &Path) -> Result<Vec<u8>, ModelFileError> {
    std::fs::read(path).map_err(|cause| ModelFileError::Io { action: "read", path: path.to_owned(), cause })
}

fn parameters_from(path: &Path, bytes: &[u8], layout: &Layout) -> Result<Vec<f32>, ModelFileError> {
    let tensors = SafeTensors::deserialize(bytes)
        .map_err(|error| ModelFileError::Format { path: path.to_owned(), reason: error.to_string() })?;
    let mismatch = |reason| ModelFileError::Tensor { path: path.to_owned(), reason };
    // The layout may be the file's own claim, and more than is in the file.
    let mut parameters = Vec::with_capacity(layout.parameters().min(bytes.len() / size_of::<f32>()));
    for entry in layout.entries() {
        let tensor = tensors.tensor(&entry.name).map_err(|_| {
            let mut names = tensors.names();
            names.sort_unstable();
            mismatch(format!("tensor {:?} is missing; the file has {}", entry.name, names.join(", ")))
        })?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != entry.shape {
            return Err(mismatch(format!(
                "tensor {:?} is {:?} {:?}, the model has F32 {:?}",
                entry.name,
                tensor.dtype(),
                tensor.shape(),
                entry.shape
            )));
        }
        let floats: Vec<f32> = tensor.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        if let Some(at) = floats.iter().position(|value| !value.is_finite()) {
            let value = floats[at];
            return Err(mismatch(format!(
                "element {at} of tensor {:?} is {value}; weights must be finite",
                entry.name
            )));
        }
        parameters.resize(entry.range.end, 0.0);
        entry.write(&floats, &mut parameters);
    }
    Ok(parameters)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::preset;
    use crate::nn::initial_parameters;

    fn trained() -> TrainedModel {
        let model = preset("conv").unwrap().resolve().unwrap();
        let parameters = initial_parameters(&model.layout, 1).to_vec();
        TrainedModel { model, parameters, loss: "mse".into(), rounds: 7 }
    }

    #[test]
    fn a_saved_model_comes_back_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        let saved = trained();
        saved.save(&path).unwrap();
        let loaded = TrainedModel::load(&path).unwrap();
        assert_eq!(loaded.model, saved.model);
        assert_eq!(loaded.parameters, saved.parameters);
        assert_eq!((loaded.rounds, loaded.loss.as_str()), (7, "mse"));
    }

    /// Scenario: kernels of this model are stored in panels. Property: its file has their elements row by row, and its
    /// hash is that of the file's tensors.
    #[test]
    fn tensors_are_row_by_row_in_files() {
        let model = preset("dense").unwrap().resolve().unwrap();
        let mut parameters = vec![0.0; model.layout.parameters()];
        for entry in model.layout.entries() {
            let tensor: Vec<f32> = (0..entry.range.len()).map(|element| element as f32).collect();
            entry.write(&tensor, &mut parameters);
        }
        let in_order = |flat: &[f32]| flat.windows(2).all(|pair| pair[1] == pair[0] + 1.0 || pair[1] == 0.0);
        assert!(!in_order(&parameters), "some kernels are stored in another order");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        TrainedModel { model, parameters, loss: "mse".into(), rounds: 7 }.save(&path).unwrap();
        let file = std::fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let layout = TrainedModel::load(&path).unwrap().model.layout;
        let floats: Vec<f32> = (layout.entries().iter())
            .flat_map(|entry| tensors.tensor(&entry.name).unwrap().data().to_vec())
            .collect::<Vec<u8>>()
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect();
        assert!(in_order(&floats));
        let (_, header) = SafeTensors::read_metadata(&file).unwrap();
        let hash = &header.metadata().as_ref().unwrap()[KEY_SHA256];
        assert_eq!(*hash, crate::hash::sha256_of_floats(&floats));
    }

    #[test]
    fn damaged_and_foreign_files_are_refused_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        trained().save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let check = |bytes: &[u8], expected: &str| {
            std::fs::write(&path, bytes).unwrap();
            let message = TrainedModel::load(&path).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        check(&whole[..whole.len() / 2], "not a safetensors file");
        check(b"", "not a safetensors file");
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        check(&flipped, "the file is damaged");
        let article = preset("article").unwrap().resolve().unwrap();
        std::fs::write(&path, &whole).unwrap();
        let message = load_parameters(&path, &article.layout).unwrap_err().to_string();
        assert!(
            message.contains("\"encoder.0.conv2d.kernel\" is F32 [3, 3, 1, 16], the model has F32 [3, 3, 1, 32]"),
            "{message}"
        );
    }
}
