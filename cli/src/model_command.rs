//! `lockstep model`: looks at models without training anything.

use std::fs;
use std::path::Path;

use anyhow::anyhow;
use clap::{Args, Subcommand};
use indicatif::HumanCount;
use lockstep_common::config::{ModelChoice, RunConfig};
use lockstep_common::model::{PRESETS, UnknownPreset, preset};

use crate::exit::usage;

/// Arguments of `lockstep model`.
#[derive(Args, Debug)]
pub(crate) struct ModelArgs {
    #[command(subcommand)]
    command: ModelCommand,
}

#[derive(Subcommand, Debug)]
enum ModelCommand {
    /// Infer every layer's shape and print the table, or what does not fit
    Check {
        /// Path of a model file (TOML), or a preset's name
        #[arg(value_name = "FILE|PRESET")]
        model: String,
    },
    /// List the presets
    List,
    /// Print a preset as the TOML of a model file, to start one's own from
    Show {
        /// A preset's name
        preset: String,
    },
}

/// Runs the command.
pub(crate) fn run(args: ModelArgs) -> anyhow::Result<()> {
    match args.command {
        ModelCommand::Check { model } => check(model),
        ModelCommand::List => list(),
        ModelCommand::Show { preset } => show(preset),
    }
}

fn check(model: String) -> anyhow::Result<()> {
    // A name without a dot or slash is a preset's, as in a configuration; but a file of that name is surely meant.
    let is_preset = PRESETS.iter().any(|(name, _)| *name == model);
    let is_file = !is_preset && Path::new(&model).is_file();
    let named = if is_file { Path::new(".").join(model).display().to_string() } else { model };
    let config = RunConfig { model: ModelChoice::Named(named), ..RunConfig::default() };
    // Not as a source: the error contains its causes.
    let spec = config.model_spec(|path| fs::read_to_string(path)).map_err(|error| usage(anyhow!("{error}")))?;
    println!("model {:?}\n\n{}", spec.name, spec.resolve().map_err(usage)?);
    Ok(())
}

fn list() -> anyhow::Result<()> {
    for (name, text) in PRESETS {
        let model = preset(name)?.resolve()?;
        println!(
            "{name:8}  {:>9} parameters  {} to {}",
            HumanCount(model.layout.parameters() as u64).to_string(),
            model.input_shape(),
            model.code_shape()
        );
        for line in opening_comment(text) {
            println!("          {line}");
        }
    }
    Ok(())
}

fn show(name: String) -> anyhow::Result<()> {
    match PRESETS.iter().find(|(preset, _)| *preset == name) {
        Some((_, text)) => print!("{text}"),
        None => return Err(usage(UnknownPreset { name })),
    }
    Ok(())
}

/// The comment that a preset's file begins with.
fn opening_comment(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map_while(|line| line.strip_prefix('#')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_says_what_it_is() {
        for (name, text) in PRESETS {
            assert!(opening_comment(text).next().is_some_and(|line| !line.is_empty()), "{name}");
            check(name.to_owned()).unwrap();
            show(name.to_owned()).unwrap();
        }
    }

    #[test]
    fn what_is_no_model_is_the_users_to_mend() {
        for (model, expected) in
            [("vgg", "no preset is called \"vgg\""), ("no/such.toml", "cannot read the model file no/such.toml")]
        {
            let error = check(model.to_owned()).unwrap_err();
            assert!(error.is::<crate::exit::Usage>());
            assert!(error.to_string().contains(expected), "{error}");
        }
        assert!(show("vgg".to_owned()).unwrap_err().is::<crate::exit::Usage>());
    }
}
