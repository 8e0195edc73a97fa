//! `lockstep reconstruct`: what a model makes of a data set, as numbers or as a picture.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use clap::Args;
use indicatif::HumanCount;
use lockstep_common::data::write_npy_f32;
use lockstep_common::image_grid::{GridError, GridSpec, write_grid_png};
use lockstep_common::nn::Loss;

use super::inference::Inference;
use super::{InferArgs, Part, Samples, batch_axes, check_writable, data_error, extension};
use crate::exit::usage;

/// Images in a picture, unless `--count` says otherwise.
pub(crate) const DEFAULT_COUNT: NonZeroUsize = NonZeroUsize::new(16).unwrap();

/// Images side by side in a picture.
const COLUMNS: NonZeroUsize = NonZeroUsize::new(8).unwrap();

/// Arguments of `lockstep reconstruct`.
#[derive(Args, Debug)]
pub(crate) struct ReconstructArgs {
    #[command(flatten)]
    infer: InferArgs,
    /// Which samples [default: all for numbers, validation for a picture]
    #[arg(long, value_enum)]
    split: Option<Part>,
    /// The file to write: .npy for 32-bit floats of shape (samples, ...sample), .png for a picture of the first images
    /// over their reconstructions
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Images in a picture [default: 16]
    #[arg(long, value_name = "N")]
    count: Option<NonZeroUsize>,
}

/// In which form reconstructions are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// All of them, as an NPY file.
    Numbers,
    /// Some of them under their originals, as a PNG file.
    Picture { images: NonZeroUsize },
}

impl Form {
    /// The form that the name of the file `out` asks for.
    fn of(out: &Path, count: Option<NonZeroUsize>) -> anyhow::Result<Self> {
        match (extension(out).as_str(), count) {
            ("npy", None) => Ok(Self::Numbers),
            ("npy", Some(count)) => Err(usage(anyhow!(
                "--count {count} is for pictures (.png), but {} is to have all reconstructions; leave it out",
                out.display()
            ))),
            ("png", count) => Ok(Self::Picture { images: count.unwrap_or(DEFAULT_COUNT) }),
            _ => Err(usage(anyhow!(
                "{} says no form: give --out a name that ends in .npy (numbers) or .png (a picture)",
                out.display()
            ))),
        }
    }

    /// What is reconstructed unless `--split` says otherwise.
    fn default_part(self) -> Part {
        match self {
            Self::Numbers => Part::All,
            // What a model was trained on would flatter it.
            Self::Picture { .. } => Part::Validation,
        }
    }
}

/// Runs the command.
pub(crate) fn reconstruct(args: ReconstructArgs) -> anyhow::Result<()> {
    let form = Form::of(&args.out, args.count)?;
    check_writable(&args.out)?;
    let trained = args.infer.load_model()?;
    let samples = args.infer.load_samples(args.split.unwrap_or(form.default_part()), &trained)?;
    let inference = Inference::new(&trained, Loss::Mse, args.infer.compute.simd);
    let pool = args.infer.thread_pool()?;
    match form {
        Form::Numbers => pool.install(|| write_numbers(&args.out, &inference, &samples)),
        Form::Picture { images } => pool.install(|| write_picture(&args.out, &inference, &samples, images)),
    }
}

fn write_numbers(out: &Path, inference: &Inference<'_>, samples: &Samples) -> anyhow::Result<()> {
    let reconstructions = inference.reconstruct(samples.len(), &|i, out| samples.write(i, out))?;
    let axes = batch_axes(samples.len(), samples.shape());
    write_npy_f32(out, &axes, &reconstructions).map_err(data_error)?;
    println!("{}: the reconstructions of {}", out.display(), samples.describe());
    Ok(())
}

fn write_picture(out: &Path, inference: &Inference<'_>, samples: &Samples, images: NonZeroUsize) -> anyhow::Result<()> {
    let drawn = draw(out, inference, samples, images)?.map_err(|error| match error {
        GridError::NotAnImage { .. } | GridError::TooLarge { .. } => usage(error),
        _ => error.into(),
    })?;
    println!(
        "{}: the first {} of {}, each over its reconstruction",
        out.display(),
        HumanCount(drawn as u64),
        samples.describe()
    );
    Ok(())
}

/// Draws the first samples, each over its reconstruction. Gives how many there are; the inner error says why they
/// cannot be drawn, for samples that are no images.
pub(crate) fn draw(
    out: &Path,
    inference: &Inference<'_>,
    samples: &Samples,
    images: NonZeroUsize,
) -> anyhow::Result<Result<usize, GridError>> {
    let images = images.get().min(samples.len());
    let read = |i: usize, out: &mut [f32]| samples.write(i, out);
    let reconstructions = inference.reconstruct(images, &read)?;
    let mut originals = vec![0.0; reconstructions.len()];
    originals.chunks_exact_mut(samples.shape().elements()).enumerate().for_each(|(i, out)| read(i, out));
    let spec = GridSpec { shape: samples.shape().clone(), columns: COLUMNS };
    Ok(write_grid_png(out, &spec, &[&originals, &reconstructions]).map(|()| images))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_the_file_says_the_form() {
        let of = |out: &str, count| Form::of(Path::new(out), NonZeroUsize::new(count));
        assert_eq!(of("a.npy", 0).unwrap(), Form::Numbers);
        assert_eq!(of("b/a.PNG", 0).unwrap(), Form::Picture { images: DEFAULT_COUNT });
        assert_eq!(of("a.png", 3).unwrap(), Form::Picture { images: NonZeroUsize::new(3).unwrap() });
        for (out, count, expected) in [
            ("a.npy", 3, "--count 3 is for pictures (.png), but a.npy is to have all reconstructions"),
            ("a.jpg", 0, "a.jpg says no form"),
            ("npy", 0, "npy says no form"),
        ] {
            let error = of(out, count).unwrap_err();
            assert!(error.is::<crate::exit::Usage>());
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
