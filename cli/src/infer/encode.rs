//! `lockstep encode`: the codes of a data set.

use std::path::PathBuf;

use anyhow::anyhow;
use clap::Args;
use lockstep_common::data::write_npy_f32;
use lockstep_common::nn::Loss;

use super::inference::Inference;
use super::{InferArgs, Part, batch_axes, check_writable, data_error, extension};
use crate::exit::usage;

/// Arguments of `lockstep encode`.
#[derive(Args, Debug)]
pub(crate) struct EncodeArgs {
    #[command(flatten)]
    infer: InferArgs,
    /// Which samples
    #[arg(long, value_enum, default_value_t = Part::All)]
    split: Part,
    /// The file to write (.npy): 32-bit floats of shape (samples, ...code)
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Runs the command.
pub(crate) fn encode(args: EncodeArgs) -> anyhow::Result<()> {
    let out = &args.out;
    if extension(out) != "npy" {
        return Err(usage(anyhow!(
            "codes are written as NPY: give --out a name that ends in .npy, not {}",
            out.display()
        )));
    }
    check_writable(out)?;
    let trained = args.infer.load_model()?;
    let samples = args.infer.load_samples(args.split, &trained)?;
    let pool = args.infer.thread_pool()?;

    let inference = Inference::new(&trained, Loss::Mse, args.infer.compute.simd);
    let codes = pool.install(|| inference.encode(samples.len(), &|i, out| samples.write(i, out)))?;
    let shape = trained.model.code_shape();
    write_npy_f32(out, &batch_axes(samples.len(), shape), &codes).map_err(data_error)?;
    println!("{}: the codes, {shape} each, of {}", out.display(), samples.describe());
    Ok(())
}
