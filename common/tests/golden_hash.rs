//! Golden hashes: the bits that small training runs end in, as they were when the numerics contract got its version.
//!
//! Everything else compares one path with another one. A change of an order of summation that all paths share shows
//! here alone.

use std::num::NonZeroU32;

use lockstep_common::fingerprint::{NUMERICS_VERSION, fingerprint};
use lockstep_common::kernel::elementwise::{AdamSlices, SquareSum};
use lockstep_common::kernel::{Arithmetic, Compute, Isa, Precision};
use lockstep_common::model::{ModelSpec, ResolvedModel};
use lockstep_common::nn::{
    Buffers, LeafSource, Loss, Network, NodeSum, Weights, ZeroProducts, initial_parameters, subtree,
};
use lockstep_common::optim::adam::{self, Adam, Moments};
use lockstep_common::reduce::{NodeSums, Tree, add_nodes};
use lockstep_common::rng::{Purpose, Stream};
use lockstep_common::shard::Schedule;

/// Rounds of every run: two epochs, whose last batches are short.
const ROUNDS: u64 = 6;
const SAMPLES: u32 = 41;
const BATCH_SIZE: u32 = 19;
const SHARDS: u32 = 4;
const SEED: u64 = 3;

/// What to do when a hash is another one.
const ADVICE: &str = "The parameters of a fixed run have other bits than before. If no order of summation, polynomial, \
    random draw or schedule was changed on purpose, this is a bug: find the change that does it. If it is on purpose: \
    raise NUMERICS_VERSION in common/src/fingerprint.rs, write the new rule into docs/numerics.md and CHANGELOG.md, \
    and put the new values here and into cli/tests/same_hash.rs";

/// The samples of one round, shard by shard.
struct Round<'a> {
    schedule: &'a Schedule,
    assignment: &'a [Vec<u32>],
    round: u64,
}

impl LeafSource for Round<'_> {
    fn samples(&self, leaf: u32) -> u32 {
        self.schedule.leaf_places(self.schedule.step(self.round).batch, leaf).len() as u32
    }

    fn write(&self, leaf: u32, i: usize, out: &mut [f32]) {
        let step = self.schedule.step(self.round);
        let place = self.schedule.leaf_places(step.batch, leaf).start as usize + i;
        let resting = self.schedule.epoch_order(step.epoch, leaf)[place];
        write_sample(self.assignment[leaf as usize][resting as usize], out);
    }
}

/// Sample `id`: about a third of its elements are exactly 0, as in images.
fn write_sample(id: u32, out: &mut [f32]) {
    let mut stream = Stream::new(8, Purpose::SelfTest, id, 0);
    out.iter_mut().for_each(|value| *value = (stream.uniform() * 1.5 - 0.5).max(0.0));
}

/// Trains `model` as a run does, and returns its `params_sha256`. With two workers, each computes half of the tree.
fn train(
    model: &ResolvedModel,
    loss: Loss,
    arithmetic: Arithmetic,
    nodes: Precision,
    (workers, zero_products): (usize, ZeroProducts),
) -> String {
    let isa = arithmetic.isa;
    let schedule = Schedule {
        seed: SEED,
        samples: NonZeroU32::new(SAMPLES).unwrap(),
        batch_size: NonZeroU32::new(BATCH_SIZE).unwrap(),
        tree: Tree::over(SHARDS).unwrap(),
        shuffle: true,
    };
    let assignment = schedule.assignment();
    let network = Network::new(model, loss, arithmetic).with_nodes(nodes).with_zero_products(zero_products);
    let buffers = Buffers::default();
    let mut parameters = initial_parameters(&model.layout, SEED).to_vec();
    let mut moments = Moments::zero(parameters.len());
    let adam = Adam { learning_rate: 0.01, ..Adam::default() };
    for round in 0..ROUNDS {
        let mut packed = vec![0.0; network.packed_len()];
        network.pack(&parameters, &mut packed);
        let weights = Weights { parameters: &parameters, packed: &packed };
        let source = Round { schedule: &schedule, assignment: &assignment, round };
        let sum = |node| subtree(&network, weights, node, &source, &buffers);
        let root = schedule.tree.root();
        let sum = match workers {
            1 => sum(root),
            2 => add(NodeSums { isa, precision: nodes }, root.children().expect("a root of four leaves").map(sum)),
            _ => panic!("{workers} workers"),
        };
        let mut updated = vec![0.0; parameters.len()];
        let slices = AdamSlices {
            parameters: &parameters,
            gradient_sum: &sum.gradient,
            first_moment: &mut moments.first,
            second_moment: &mut moments.second,
            updated: &mut updated,
        };
        adam::apply(isa, adam.step(round + 1, sum.samples), slices, &mut SquareSum::default());
        parameters = updated;
    }
    model.layout.sha256(&parameters)
}

fn add(sums: NodeSums, [mut left, right]: [NodeSum; 2]) -> NodeSum {
    add_nodes(sums, &mut left.gradient, &right.gradient);
    NodeSum { gradient: left.gradient, loss: left.loss + right.loss, samples: left.samples + right.samples }
}

/// Scenario: the model is trained on every instruction set, by one worker and by two. Property: its parameters are the
/// golden ones.
fn check(text: &str, loss: Loss, golden: &str) {
    check_in((Compute::F32, Precision::F32), text, loss, golden);
}

/// With product-sums that are computed so, and nodes of the reduction tree of this precision.
fn check_in((compute, nodes): (Compute, Precision), text: &str, loss: Loss, golden: &str) {
    let model = ModelSpec::from_toml(text).unwrap().resolve().unwrap();
    for isa in Isa::available() {
        for (workers, zero_products) in
            [(1, ZeroProducts::Taken), (1, ZeroProducts::LeftOut), (2, ZeroProducts::AsIsFaster)]
        {
            let arithmetic = Arithmetic { isa, compute };
            let got = train(&model, loss, arithmetic, nodes, (workers, zero_products));
            let name = &model.spec.name;
            assert_eq!(
                got, golden,
                "{name} ({loss}) in {arithmetic}, {nodes} nodes, workers: {workers}, products with zeros: {zero_products:?}. {ADVICE}"
            );
        }
    }
}

/// Wide enough for every panel, and a code that fills no vector.
const DENSE: &str = r#"
    name = "dense"
    input = [196]
    encoder = [
        { layer = "dense", units = 83, activation = "relu" },
        { layer = "dense", units = 13 },
    ]
    decoder = [
        { layer = "dense", units = 83, activation = "relu" },
        { layer = "dense", units = 196, activation = "sigmoid" },
    ]
"#;

#[test]
fn a_dense_model() {
    check(DENSE, Loss::Mse, "8c2a603ab5d8ce0ad1056256f38c55b7b247babcb2cf1765f86a82dded44fef7");
    check(DENSE, Loss::BinaryCrossentropy, "6080bfa20b9c77ad6e5d30eda269e159b06ce1c6ee6eb15e647972788de94f50");
}

/// The layers of the founding article, at a quarter of the size.
#[test]
fn a_convolutional_model() {
    check(
        include_str!("golden/article.toml"),
        Loss::Mse,
        "2f6cce41ae3de8d8d998d0678610ce413afc4869f1fbb9374bf34115240fff02",
    );
}

/// More channels than a vector has lanes, and gathers that go tap by tap.
#[test]
fn a_convolutional_model_with_many_channels() {
    check(
        include_str!("golden/wide_channels.toml"),
        Loss::Mse,
        "70be53269a9726e152541f43a13fa31695ee70c0921f0563ddbd998adea86072",
    );
}

/// Layers that leave out products with zeros: a padded convolution before a max pooling, and a transposed one after a relu.
const SPARSE: &str = include_str!("support/sparse.toml");

/// Numerics version 2 had this hash, too.
#[test]
fn a_convolutional_model_whose_zeros_are_left_out() {
    check(SPARSE, Loss::Mse, "e8c715f6d8d1be7e934a04cbf6eff48fa91041575e57308bbaa15ac97962f3d9");
}

/// Every kind of layer and most activations. What is added to the model's file changes the hashes, and no rule.
#[test]
fn the_self_test_model() {
    check(
        include_str!("../models/self-test.toml"),
        Loss::Mse,
        "0937a4188d6744fa08270efeaa070648513b6049788a0f8980e17821239507a8",
    );
    check(
        include_str!("../models/self-test.toml"),
        Loss::BinaryCrossentropy,
        "51a6f42e0638b089b856009ac40412875273fc33825bb8500026b32cf18395aa",
    );
}

/// The same models from operands that are rounded to bfloat16.
#[test]
fn models_in_bfloat16() {
    let check = |text, loss, golden| check_in((Compute::Bf16, Precision::F32), text, loss, golden);
    check(DENSE, Loss::Mse, "63b642f92a658a58c0ea1dd530df1636dab3ef095838313ffdf9b1ea7572811e");
    check(
        include_str!("golden/article.toml"),
        Loss::Mse,
        "8b51bfd9e9b17f94df5cafce25075edee7746dd287c2a8f7d85305e505bb568d",
    );
    check(SPARSE, Loss::Mse, "daa1e2ad560708f6ff46cf881934ce08f36addd2af29aabf88bc68a9dc755384");
    check(
        include_str!("golden/wide_channels.toml"),
        Loss::Mse,
        "5b215ea08675c38ec2c8c209835e16654c0bdc0cf482447fd5d06d959c1b2b66",
    );
    check(
        include_str!("../models/self-test.toml"),
        Loss::BinaryCrossentropy,
        "ca3bcda20b3de63ad2adf2acc1799b2dbf2586e29e33ee8037152847686429c5",
    );
}

/// The same, added in blocks, as AMX adds them.
#[test]
fn models_in_bfloat16_by_blocks() {
    let check = |text, loss, golden| check_in((Compute::Bf16Amx, Precision::F32), text, loss, golden);
    check(DENSE, Loss::Mse, "4c6a9c838e3cdb8936a970cd031911d539c1519197e5eac47988d98f6b7598ca");
    check(
        include_str!("golden/article.toml"),
        Loss::Mse,
        "11968594ad97dfab280feab497700a56cdb7687e28fbb758dba4948cf7010fba",
    );
    check(SPARSE, Loss::Mse, "97a2e71b8dcbf07a8b088b9dfab1fcbd2953caa255974991e41695bd76948051");
    check(
        include_str!("golden/wide_channels.toml"),
        Loss::Mse,
        "57c8fdf265c4bf1bf5fbf732128047999ebc074716ce6eb1f3881a6865e98f8a",
    );
    check(
        include_str!("../models/self-test.toml"),
        Loss::BinaryCrossentropy,
        "61ddd92743d4d5a52a296b674e880c8801dae5018acd151ffa8653a56732a85e",
    );
}

/// The same models with nodes of the reduction tree that are rounded to bfloat16.
#[test]
fn models_with_nodes_in_bfloat16() {
    let check = |text, loss, golden| check_in((Compute::F32, Precision::Bf16), text, loss, golden);
    check(DENSE, Loss::Mse, "0b653e2f017fd903843e30b66bd0cc7d339c155f552d105f5d15e7e7d77e75fe");
    check(
        include_str!("golden/article.toml"),
        Loss::Mse,
        "01ef4ada9413ac4b5c2e7e05a055da29db2c287993afad9962e28ddfb155897c",
    );
}

/// What workers announce when they join: whoever has another one is refused. A new activation or a layer more in the
/// self-test model changes it, and no rule.
#[test]
fn the_fingerprint() {
    for isa in Isa::available() {
        assert_eq!(
            fingerprint(isa).to_string(),
            "34c1ea94ac7aa1f4aa9acc716ef3ab2c",
            "on {isa}, NUMERICS_VERSION {NUMERICS_VERSION}. {ADVICE}"
        );
        for (compute, golden) in [
            (Compute::Bf16, "9bcf6925949503556ff255b38a0aaca1"),
            (Compute::Bf16Amx, "8252d56dd396558156acb921f005541e"),
        ] {
            assert_eq!(
                fingerprint(Arithmetic { isa, compute }).to_string(),
                golden,
                "in {compute} on {isa}, NUMERICS_VERSION {NUMERICS_VERSION}. {ADVICE}"
            );
        }
    }
}
