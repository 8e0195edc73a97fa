//! What may change between the parts of a run, and what may not.

use crate::config::{ConfigError, RunConfig};

/// Keys that are no part of the mathematics: they may change when a run goes on. `data.source` and `data.validation` are
/// places; what lies there is compared by its digest. What is done about rounds that are not finite may change, because a
/// run that has stopped at one must be able to go on; it counts from then on.
const MAY_CHANGE: [&str; 8] = [
    "epochs",
    "max_rounds",
    "cluster",
    "checkpoint",
    "data.source",
    "data.validation",
    "non_finite.action",
    "non_finite.max_in_a_row",
];

/// A key of the configuration that a run cannot change any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} was {was} when the run began and is {is} now; it is part of the mathematics: begin a new run for it")]
pub struct Changed {
    /// The key, such as `optimizer.learning_rate`.
    pub key: String,
    /// Its value when the run began, as TOML; `absent` without one.
    pub was: String,
    /// Its value now.
    pub is: String,
}

/// The first key in which `now` differs from `began` in a way that would change the mathematics.
///
/// # Errors
/// When one of them cannot be written as TOML.
pub fn changed(began: &RunConfig, now: &RunConfig) -> Result<Option<Changed>, ConfigError> {
    let (began, now) = (keys(began)?, keys(now)?);
    let value = |keys: &[(String, String)], key: &str| {
        keys.iter().find(|(known, _)| known == key).map_or("absent".to_owned(), |(_, value)| value.clone())
    };
    let changed = began.iter().chain(&now).map(|(key, _)| key).find(|key| {
        let may = MAY_CHANGE
            .iter()
            .any(|may| key.strip_prefix(may).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')));
        !may && value(&began, key) != value(&now, key)
    });
    Ok(changed.map(|key| Changed { key: key.clone(), was: value(&began, key), is: value(&now, key) }))
}

/// Every key with its value as TOML.
fn keys(config: &RunConfig) -> Result<Vec<(String, String)>, ConfigError> {
    let table = toml::Table::try_from(config).map_err(|error| ConfigError::Value(error.to_string()))?;
    let mut keys = Vec::new();
    flatten("", &toml::Value::Table(table), &mut keys);
    Ok(keys)
}

fn flatten(path: &str, value: &toml::Value, keys: &mut Vec<(String, String)>) {
    let join = |part: &str| if path.is_empty() { part.to_owned() } else { format!("{path}.{part}") };
    match value {
        toml::Value::Table(table) => table.iter().for_each(|(key, value)| flatten(&join(key), value, keys)),
        toml::Value::Array(values) if values.iter().any(toml::Value::is_table) => {
            values.iter().enumerate().for_each(|(i, value)| flatten(&join(&i.to_string()), value, keys));
        }
        value => keys.push((path.to_owned(), value.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelChoice;
    use crate::model::preset;

    fn config(settings: &[&str]) -> RunConfig {
        let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
        let mut config = RunConfig::parse("test", "name = \"x\"", &settings).unwrap();
        let model = config.model_spec(|_| Err(std::io::ErrorKind::NotFound.into())).unwrap();
        config.model = ModelChoice::Inline(model);
        config
    }

    #[test]
    fn what_is_no_mathematics_may_change() {
        let free = [
            "epochs=70",
            "max_rounds=9",
            "cluster.min_workers=3",
            "cluster.lease_timeout_ms=9000",
            "checkpoint.every_rounds=4",
            "non_finite.action=skip",
            "data.source=elsewhere.npy",
            "data.validation=there.npy",
        ];
        assert_eq!(changed(&config(&[]), &config(&free)).unwrap(), None);
    }

    #[test]
    fn any_other_key_is_named_with_both_values() {
        let check = |setting: &str, expected: &str| {
            let changed = changed(&config(&[]), &config(&[setting])).unwrap().unwrap();
            assert!(changed.to_string().contains(expected), "{changed}");
        };
        check("seed=5", "seed was 0 when the run began and is 5 now");
        check("batch_size=64", "batch_size was 128");
        check("shards=8", "shards was 16");
        check("shuffle=false", "shuffle was true");
        check("loss=binary_crossentropy", "loss was \"mse\"");
        check("name=y", "name was \"x\"");
        check("init_from=w.safetensors", "init_from was absent when the run began and is \"w.safetensors\" now");
        check("optimizer.learning_rate=0.1", "optimizer.learning_rate was 0.001");
        check("non_finite.rate_factor=0.1", "non_finite.rate_factor was 0.5");
        check("data.validation_fraction=0.2", "data.validation_fraction was 0.1");
        check("precision.wire=bf16", "precision.wire was \"f32\" when the run began and is \"bf16\" now");
        check("precision.compute=bf16", "precision.compute was \"f32\" when the run began and is \"bf16\" now");
        check("model=dense", "model.");
    }

    #[test]
    fn a_layer_that_differs_is_named_by_its_place() {
        let with_units = |units: u32| {
            let mut spec = preset("dense").unwrap().to_toml().unwrap();
            let at = spec.find("units = ").unwrap();
            let end = at + spec[at..].find('\n').unwrap();
            spec.replace_range(at..end, &format!("units = {units}"));
            let model = ModelChoice::Inline(crate::model::ModelSpec::from_toml(&spec).unwrap());
            RunConfig { model, ..config(&[]) }
        };
        let changed = changed(&with_units(300), &with_units(301)).unwrap().unwrap();
        assert!(changed.key.starts_with("model.encoder.") && changed.key.ends_with(".units"), "{changed}");
        assert_eq!((changed.was.as_str(), changed.is.as_str()), ("300", "301"));
    }
}
