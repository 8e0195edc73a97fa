//! `lockstep eval`: how well a model reconstructs a data set.

use std::fmt;

use anyhow::anyhow;
use clap::Args;
use indicatif::HumanCount;
use lockstep_common::data::Dataset;
use lockstep_common::model_file::TrainedModel;
use lockstep_common::nn::Loss;
use lockstep_common::pca::{Pca, PcaError, Rows};
use serde::Serialize;

use super::inference::Inference;
use super::{InferArgs, Part, Samples};
use crate::exit::usage;

/// Arguments of `lockstep eval`.
#[derive(Args, Debug)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    infer: InferArgs,
    /// Which samples
    #[arg(long, value_enum, default_value_t = Part::Validation)]
    split: Part,
    /// Also measure the best linear code of the same size: PCA, fitted to the data's training samples
    #[arg(long)]
    pca: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn eval(args: EvalArgs) -> anyhow::Result<()> {
    let trained = args.infer.load_model()?;
    let loss = trained_loss(&trained)?;
    let samples = args.infer.load_samples(args.split, &trained)?;
    let measure = |loss| {
        Inference::new(&trained, loss, args.infer.compute.simd)
            .mean_loss(samples.len(), &|i, out| samples.write(i, out))
    };
    let evaluate = || -> anyhow::Result<Evaluation> {
        Ok(Evaluation {
            model: trained.model.spec.name.clone(),
            rounds: trained.rounds,
            data: samples.name(),
            split: args.split,
            samples: samples.len(),
            mse: measure(Loss::Mse),
            binary_crossentropy: (loss == Loss::BinaryCrossentropy).then(|| measure(loss)),
            pca: args.pca.then(|| pca(&samples, trained.model.code_shape().elements())).transpose().map_err(usage)?,
        })
    };
    let evaluation = args.infer.thread_pool()?.install(evaluate)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&evaluation)?);
    } else {
        print!("{}", Described { evaluation: &evaluation, samples: &samples.describe() });
    }
    Ok(())
}

/// The loss that a model was trained on.
fn trained_loss(trained: &TrainedModel) -> anyhow::Result<Loss> {
    let known = [Loss::Mse, Loss::BinaryCrossentropy];
    known.into_iter().find(|loss| loss.name() == trained.loss).ok_or_else(|| {
        usage(anyhow!(
            "the model was trained on the loss {:?}, which this version of lockstep does not know",
            trained.loss
        ))
    })
}

/// PCA with as many components as the code has values, fitted to the training samples and measured on the samples.
pub(crate) fn pca(samples: &Samples, components: usize) -> Result<Baseline, PcaError> {
    let train: &Dataset = &samples.train;
    let read_train = |i: usize, out: &mut [f32]| train.sample(i).write_f32(out);
    let features = train.sample_elements();
    let pca = Pca::fit(Rows { count: train.len(), features, read: &read_train }, components)?;
    let read = |i: usize, out: &mut [f32]| samples.write(i, out);
    let mse = pca.reconstruction_mse(Rows { count: samples.len(), features, read: &read })?;
    Ok(Baseline { mse, components: pca.component_count(), fitted_samples: pca.fitted_rows() })
}

/// What was measured; for programs.
#[derive(Debug, Serialize)]
struct Evaluation {
    model: String,
    rounds: u64,
    data: String,
    split: Part,
    samples: usize,
    mse: f64,
    /// Of models that were trained on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    binary_crossentropy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pca: Option<Baseline>,
}

/// What PCA achieves.
#[derive(Debug, Serialize)]
pub(crate) struct Baseline {
    pub(crate) mse: f64,
    components: usize,
    fitted_samples: usize,
}

/// What was measured; for a person.
struct Described<'a> {
    evaluation: &'a Evaluation,
    samples: &'a str,
}

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Evaluation { model, rounds, mse, binary_crossentropy, pca, .. } = self.evaluation;
        writeln!(f, "model                {model}, after {} rounds", HumanCount(*rounds))?;
        writeln!(f, "data                 {}", self.samples)?;
        writeln!(f, "mse                  {mse:.6}")?;
        if let Some(loss) = binary_crossentropy {
            writeln!(f, "binary crossentropy  {loss:.6}")?;
        }
        if let Some(Baseline { mse, components, fitted_samples }) = pca {
            let fitted = HumanCount(*fitted_samples as u64);
            writeln!(f, "mse of PCA           {mse:.6}  ({components} components, fitted to {fitted} samples)")?;
        }
        Ok(())
    }
}
