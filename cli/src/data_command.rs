//! `lockstep data`: fetches Fashion-MNIST, and says what is in a data set.

use std::fmt;
use std::io::{self, IsTerminal};

use anyhow::anyhow;
use clap::{Args, Subcommand};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use lockstep_common::data::{Dataset, Dtype, Elements};

use crate::data_source;
use crate::exit::usage;
use crate::fetch::{self, FetchProgress};

/// Arguments of `lockstep data`.
#[derive(Args, Debug)]
pub(crate) struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(Subcommand, Debug)]
enum DataCommand {
    /// Fetch the whole of Fashion-MNIST (30 MiB) into the cache directory: the source `fashion-mnist` finds it there
    ///
    /// The cache directory is $LOCKSTEP_CACHE, else $XDG_CACHE_HOME/lockstep, else ~/.cache/lockstep. Every file's
    /// SHA-256 is checked; files that are there already are not fetched again.
    Fetch {
        /// A directory on a web server that has the four files
        #[arg(long, value_name = "URL", default_value = fetch::DEFAULT_BASE_URL, value_parser = http_url)]
        from: String,
    },
    /// Say how many samples a data set has, their shape, type and values
    Info {
        /// bundled, fashion-mnist, or the path of an IDX, NPY or NPZ file or of a directory with MNIST's file names
        source: String,
    },
}

/// Runs the command.
pub(crate) fn run(args: DataArgs) -> anyhow::Result<()> {
    match args.command {
        DataCommand::Fetch { from } => fetch(&from),
        DataCommand::Info { source } => info(&source),
    }
}

fn fetch(from: &str) -> anyhow::Result<()> {
    let cache = data_source::fashion_mnist_cache().ok_or_else(|| {
        usage(anyhow!("there is no cache directory: none of LOCKSTEP_CACHE, XDG_CACHE_HOME and HOME is set"))
    })?;
    let mut display = FetchDisplay::new();
    fetch::fetch_fashion_mnist(from, &cache, |progress| display.show(progress))?;
    println!("Fashion-MNIST is in {}; use it with --data fashion-mnist", cache.display());
    Ok(())
}

/// What can be fetched from; refused here, it is an error of usage.
fn http_url(text: &str) -> Result<String, &'static str> {
    let is_http = text.strip_prefix("http://").is_some_and(|rest| !rest.is_empty());
    is_http.then(|| text.to_owned()).ok_or("only http:// URLs are supported (the files are protected by their SHA-256)")
}

/// A bar for the file at hand on a terminal, a line for every finished file elsewhere.
struct FetchDisplay {
    bar: Option<ProgressBar>,
}

impl FetchDisplay {
    fn new() -> Self {
        let bar = io::stderr().is_terminal().then(|| ProgressBar::no_length().with_style(bar_style()));
        Self { bar }
    }

    fn show(&mut self, progress: FetchProgress<'_>) {
        match (progress, &self.bar) {
            (FetchProgress::Receiving { file, received_bytes, total_bytes }, Some(bar)) => {
                bar.set_message(file.to_owned());
                bar.set_length(total_bytes.unwrap_or(received_bytes));
                bar.set_position(received_bytes);
            }
            (FetchProgress::Receiving { .. }, None) => {}
            (FetchProgress::Present { file }, _) => self.line(format!("{file}: was there already")),
            (FetchProgress::Stored { file }, _) => self.line(format!("{file}: fetched")),
        }
    }

    fn line(&self, text: String) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for FetchDisplay {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn info(source: &str) -> anyhow::Result<()> {
    // Nothing is held out: what stands apart is the source's own test part.
    let split = data_source::open(source, None, 0.0)?;
    print!("{}", Info(&split.train));
    if let Some(validation) = &split.validation {
        print!("\n{}", Info(validation));
    }
    Ok(())
}

/// A data set, described for a person.
struct Info<'a>(&'a Dataset);

impl fmt::Display for Info<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let data = self.0;
        let Values { min, max, mean } = Values::of(data.elements());
        let meaning = match data.dtype() {
            Dtype::U8 => "models are given value / 255",
            Dtype::F32 => "models are given the values as they are",
        };
        writeln!(f, "name     {}", data.name())?;
        writeln!(f, "samples  {}", HumanCount(data.len() as u64))?;
        writeln!(f, "shape    {} ({} values)", data.sample_shape(), data.sample_elements())?;
        writeln!(f, "type     {} ({meaning})", data.dtype())?;
        writeln!(f, "values   min {min}, max {max}, mean {mean:.5}")
    }
}

/// The values of a data set, in its own unit.
#[derive(Debug, PartialEq)]
struct Values {
    min: f64,
    max: f64,
    mean: f64,
}

impl Values {
    /// Of no elements at all, which a data set does not have, the mean is NaN.
    fn of(elements: &Elements) -> Self {
        match elements {
            Elements::U8(elements) => Self::of_each(elements.iter().map(|&element| f64::from(element))),
            Elements::F32(elements) => Self::of_each(elements.iter().map(|&element| f64::from(element))),
        }
    }

    fn of_each(values: impl ExactSizeIterator<Item = f64>) -> Self {
        let count = values.len() as f64;
        let start = (f64::INFINITY, f64::NEG_INFINITY, 0.0);
        let (min, max, sum) =
            values.fold(start, |(min, max, sum), value| (value.min(min), value.max(max), sum + value));
        Self { min, max, mean: sum / count }
    }
}

#[cfg(test)]
mod tests {
    use lockstep_common::shape::Shape;

    use super::*;

    #[test]
    fn a_data_set_is_described_in_its_own_unit() {
        let bytes = Dataset::new("bytes", Shape::new([1, 2]), Elements::U8(vec![0, 255, 10, 15])).unwrap();
        let expected = "name     bytes\nsamples  2\nshape    1x2 (2 values)\n\
                        type     u8 (models are given value / 255)\nvalues   min 0, max 255, mean 70.00000\n";
        assert_eq!(Info(&bytes).to_string(), expected);
        let floats = Elements::F32(vec![-1.5, 0.25]);
        assert_eq!(Values::of(&floats), Values { min: -1.5, max: 0.25, mean: -0.625 });
    }

    #[test]
    fn only_plain_http_is_fetched() {
        assert!(http_url(fetch::DEFAULT_BASE_URL).is_ok());
        for refused in ["https://example.org/", "ftp://example.org", "/data", "http://", ""] {
            assert!(http_url(refused).is_err(), "{refused}");
        }
    }
}
