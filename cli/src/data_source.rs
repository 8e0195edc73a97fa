//! From what people write on the command line to samples, and where fetched data are kept.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use lockstep_common::data::{self, OpenOptions, Source, Split};

use crate::exit::usage;

/// Fashion-MNIST within the cache directory.
const FASHION_MNIST: &str = "fashion-mnist";

/// Reads the samples of `source`: `bundled`, `fashion-mnist` or a path. Held out are the samples of `validation` if
/// there is such a file, else the source's own test part, else the last `validation_fraction` of the samples.
pub(crate) fn open(source: &str, validation: Option<&Path>, validation_fraction: f64) -> anyhow::Result<Split> {
    let options = OpenOptions {
        validation: validation.map(Path::to_owned),
        validation_fraction,
        fashion_mnist_cache: fashion_mnist_cache(),
        ..OpenOptions::default()
    };
    data::open(&Source::from(source), &options).map_err(usage)
}

/// Where `lockstep data fetch` puts Fashion-MNIST. `None` when no variable says where the user's files are.
pub(crate) fn fashion_mnist_cache() -> Option<PathBuf> {
    Some(cache_directory(|name| std::env::var_os(name))?.join(FASHION_MNIST))
}

/// `$LOCKSTEP_CACHE`, else `$XDG_CACHE_HOME/lockstep`, else `~/.cache/lockstep`; an empty variable is as good as none.
fn cache_directory(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let directory = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // The XDG specification has relative paths ignored.
    let xdg = || directory("XDG_CACHE_HOME").filter(|path| path.is_absolute()).map(|cache| cache.join("lockstep"));
    let home = || directory("HOME").map(|home| home.join(".cache").join("lockstep"));
    directory("LOCKSTEP_CACHE").or_else(xdg).or_else(home)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_variable_names_the_cache() {
        let check = |variables: &[(&str, &str)], expected: Option<&str>| {
            let variable =
                |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
            assert_eq!(cache_directory(variable).as_deref(), expected.map(Path::new), "{variables:?}");
        };
        let (own, xdg, home) = (("LOCKSTEP_CACHE", "own"), ("XDG_CACHE_HOME", "/xdg"), ("HOME", "/home/me"));
        check(&[own, xdg, home], Some("own"));
        check(&[xdg, home], Some("/xdg/lockstep"));
        check(&[home], Some("/home/me/.cache/lockstep"));
        check(&[("LOCKSTEP_CACHE", ""), ("XDG_CACHE_HOME", "relative"), home], Some("/home/me/.cache/lockstep"));
        check(&[("HOME", "")], None);
        check(&[], None);
    }

    #[test]
    fn bad_sources_are_the_users_to_mend() {
        let error = open("/nonexistent/samples.npy", None, 0.1).unwrap_err();
        assert!(error.is::<crate::exit::Usage>(), "{error}");
        assert!(error.to_string().starts_with("cannot read /nonexistent/samples.npy: "), "{error}");
        let error = open("bundled", None, 1.0).unwrap_err();
        assert_eq!(error.to_string(), "the validation fraction is 1; it must be at least 0 and below 1");
    }
}
