//! The models that come with Lockstep, as the same TOML that users write.

use super::spec::ModelSpec;

/// Name and text of every preset.
pub const PRESETS: [(&str, &str); 4] = [
    ("conv", include_str!("../../models/conv.toml")),
    ("article", include_str!("../../models/article.toml")),
    ("dense", include_str!("../../models/dense.toml")),
    ("wide", include_str!("../../models/wide.toml")),
];

/// A name that is no preset's.
#[derive(Debug, thiserror::Error)]
#[error("no preset is called {name:?}; there are conv, article, dense and wide (a model file is given with --model)")]
pub struct UnknownPreset {
    /// What was asked for.
    pub name: String,
}

/// The preset called `name`.
///
/// # Errors
/// [`UnknownPreset`] lists the names that exist.
pub fn preset(name: &str) -> Result<ModelSpec, UnknownPreset> {
    let (_, text) =
        PRESETS.iter().find(|(preset, _)| *preset == name).ok_or_else(|| UnknownPreset { name: name.to_owned() })?;
    Ok(ModelSpec::from_toml(text).expect("every preset parses: a test reads them all"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_parses_and_resolves() {
        for (name, _) in PRESETS {
            let spec = preset(name).unwrap();
            assert_eq!(spec.name, name);
            spec.resolve().unwrap();
        }
        assert!(preset("vgg").unwrap_err().to_string().contains("conv, article, dense and wide"));
    }
}
