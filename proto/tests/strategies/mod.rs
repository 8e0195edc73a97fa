//! Any values of the domain types that travel.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "every test takes what it needs")]

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use lockstep_common::data::Dtype;
use lockstep_common::fingerprint::Fingerprints;
use lockstep_common::hash::Digest;
use lockstep_common::kernel::{Compute, Precision};
use lockstep_common::model::{Activation, ConvSpec, LayerSpec, LayoutHash, ModelSpec, Padding, Pair, PoolSpec};
use lockstep_common::nn::Loss;
use lockstep_common::progress::{
    Breakdown, EpochReport, Event, RoundReport, RunState, RunStatus, TimedEvent, Transport, WorkerStatus,
};
use lockstep_common::protocol::{
    Assignment, Finding, FromWorker, Handing, Job, JoinRequest, KeepList, LeafTask, MAX_NAMED_SAMPLES, MemberId,
    NodeChunk, NodeReport, Samples, ShardRef, SharedMemory, Split, ToWorker, Welcome, Work,
};
use lockstep_common::reduce::{NodeId, Tree};
use lockstep_common::shape::Shape;
use lockstep_common::shard::Schedule;
use lockstep_common::shared_memory::{MAX_SLOTS, Offer};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

pub fn text() -> impl Strategy<Value = String> {
    "[a-zA-Zäß0-9 :,.\n]{0,40}"
}

pub fn duration() -> impl Strategy<Value = Duration> {
    (1u64..u64::MAX).prop_map(Duration::from_micros)
}

pub fn digest() -> impl Strategy<Value = Digest> {
    any::<u128>().prop_map(Digest)
}

pub fn member() -> impl Strategy<Value = MemberId> {
    (1u32.., 1u32..).prop_map(|(worker, incarnation)| MemberId { worker, incarnation })
}

pub fn node() -> impl Strategy<Value = NodeId> {
    (0u8..=16, any::<u32>()).prop_map(|(level, index)| NodeId { level, index: index & ((1u32 << (16 - level)) - 1) })
}

pub fn work() -> impl Strategy<Value = Work> {
    prop_oneof![
        any::<u64>().prop_map(|round| Work::Gradient { round }),
        any::<u64>().prop_map(|round| Work::Evaluation { round }),
        any::<u64>().prop_map(|round| Work::Inspection { round }),
    ]
}

/// A shard of a run with `shards` shards.
pub fn shard_of(shards: u32) -> impl Strategy<Value = ShardRef> {
    (prop_oneof![Just(Split::Training), Just(Split::Validation)], 0..shards)
        .prop_map(|(split, shard)| ShardRef { split, shard })
}

fn pair() -> impl Strategy<Value = Pair> {
    (any::<u32>(), any::<u32>()).prop_map(|(rows, columns)| Pair { rows: rows as usize, columns: columns as usize })
}

fn shape() -> impl Strategy<Value = Shape> {
    vec(1usize..50, 0..4).prop_map(Shape::new)
}

fn padding() -> impl Strategy<Value = Padding> {
    prop_oneof![Just(Padding::Valid), Just(Padding::Same)]
}

fn activation() -> impl Strategy<Value = Activation> {
    proptest::sample::select(&Activation::ALL[..])
}

fn conv() -> impl Strategy<Value = ConvSpec> {
    (any::<u32>(), pair(), pair(), padding(), activation(), any::<bool>()).prop_map(
        |(filters, kernel_size, strides, padding, activation, use_bias)| ConvSpec {
            filters: filters as usize,
            kernel_size,
            strides,
            padding,
            activation,
            use_bias,
        },
    )
}

fn pool() -> impl Strategy<Value = PoolSpec> {
    (pair(), option::of(pair()), padding()).prop_map(|(pool_size, strides, padding)| PoolSpec {
        pool_size,
        strides,
        padding,
    })
}

fn layer() -> impl Strategy<Value = LayerSpec> {
    prop_oneof![
        conv().prop_map(LayerSpec::Conv2d),
        conv().prop_map(LayerSpec::Conv2dTranspose),
        pool().prop_map(LayerSpec::MaxPool2d),
        pool().prop_map(LayerSpec::AveragePool2d),
        pair().prop_map(|size| LayerSpec::UpSampling2d { size }),
        (any::<u32>(), activation(), any::<bool>()).prop_map(|(units, activation, use_bias)| LayerSpec::Dense {
            units: units as usize,
            activation,
            use_bias
        }),
        Just(LayerSpec::Flatten {}),
        shape().prop_map(|target_shape| LayerSpec::Reshape { target_shape }),
        activation().prop_map(|activation| LayerSpec::Activation { activation }),
    ]
}

pub fn model() -> impl Strategy<Value = ModelSpec> {
    (text(), shape(), vec(layer(), 0..6), vec(layer(), 0..6)).prop_map(|(name, input, encoder, decoder)| ModelSpec {
        name,
        input,
        encoder,
        decoder,
    })
}

pub fn schedule() -> impl Strategy<Value = Schedule> {
    (any::<u64>(), 1u32.., 1u32.., 0u32..=16, any::<bool>()).prop_map(|(seed, samples, batch_size, levels, shuffle)| {
        Schedule {
            seed,
            samples: NonZeroU32::new(samples).unwrap(),
            batch_size: NonZeroU32::new(batch_size).unwrap(),
            tree: Tree::over(1 << levels).unwrap(),
            shuffle,
        }
    })
}

pub fn job() -> impl Strategy<Value = Job> {
    (
        text(),
        model(),
        any::<u64>(),
        prop_oneof![Just(Loss::Mse), Just(Loss::BinaryCrossentropy)],
        schedule(),
        any::<u32>(),
        shape(),
        prop_oneof![Just(Dtype::U8), Just(Dtype::F32)],
        (compute(), precision()),
    )
        .prop_map(
            |(run, model, layout, loss, schedule, validation_samples, sample_shape, dtype, (compute, wire))| Job {
                run,
                model,
                layout: LayoutHash(layout),
                loss,
                schedule,
                validation_samples,
                sample_shape,
                dtype,
                compute,
                wire,
            },
        )
}

fn compute() -> impl Strategy<Value = Compute> {
    prop_oneof![Just(Compute::F32), Just(Compute::Bf16), Just(Compute::Bf16Amx)]
}

pub fn precision() -> impl Strategy<Value = Precision> {
    prop_oneof![Just(Precision::F32), Just(Precision::Bf16)]
}

pub fn join() -> impl Strategy<Value = JoinRequest> {
    (any::<u64>(), text(), text(), (digest(), digest(), digest()), 1u32.., text()).prop_map(
        |(process, name, version, (f32, bf16, bf16_amx), threads, isa)| JoinRequest {
            process,
            name,
            version,
            fingerprints: Fingerprints { f32, bf16, bf16_amx },
            threads,
            isa,
        },
    )
}

pub fn welcome() -> impl Strategy<Value = Welcome> {
    (member(), job(), duration(), option::of((offer(), offer()))).prop_map(
        |(member, job, heartbeat_interval, shared)| {
            let shared_memory = shared.map(|(parameters, gradients)| Box::new(SharedMemory { parameters, gradients }));
            Welcome { member, job, heartbeat_interval, shared_memory }
        },
    )
}

fn offer() -> impl Strategy<Value = Offer> {
    (any::<(u32, u32, u128)>(), 1..=MAX_SLOTS).prop_map(|((process, descriptor, token), slots)| Offer {
        process,
        descriptor,
        token,
        slots,
    })
}

/// A small job of square grey images with this many bytes a side.
pub fn small_job(shards: u32, samples: u32, batch_size: u32, side: usize) -> Job {
    Job {
        run: "r".to_owned(),
        model: ModelSpec { name: "m".to_owned(), input: Shape::new([side * side]), encoder: vec![], decoder: vec![] },
        layout: LayoutHash(7),
        loss: Loss::Mse,
        schedule: Schedule {
            seed: 1,
            samples: NonZeroU32::new(samples).unwrap(),
            batch_size: NonZeroU32::new(batch_size).unwrap(),
            tree: Tree::over(shards).unwrap(),
            shuffle: true,
        },
        validation_samples: samples,
        sample_shape: Shape::new([side, side]),
        dtype: Dtype::U8,
        compute: Compute::F32,
        wire: Precision::F32,
    }
}

/// `count` samples with ids from `first` on.
pub fn samples(first: u32, count: u32, sample_bytes: usize) -> Samples {
    let data = (0..count as usize * sample_bytes).map(|i| (i * 7 + first as usize) as u8).collect();
    Samples { ids: (first..first + count).collect(), data }
}

/// An assignment of `shards` leaves at most, some with `per_leaf` samples inline.
pub fn assignment(shards: u32, per_leaf: u32, sample_bytes: usize) -> impl Strategy<Value = Assignment> {
    (work(), vec(0u8..3, shards as usize)).prop_map(move |(work, kinds)| {
        let task = |(leaf, kind): (u32, u8)| {
            let inline = match kind {
                0 => return None,
                1 => None,
                _ => Some(Arc::new(samples(leaf * per_leaf, per_leaf, sample_bytes))),
            };
            let handing = [Handing::Summed, Handing::Alone, Handing::Compared][leaf as usize % 3];
            Some(LeafTask { leaf, inline, handing })
        };
        Assignment { work, leaves: (0..).zip(kinds).filter_map(task).collect() }
    })
}

pub fn floats() -> impl Strategy<Value = Vec<f32>> {
    vec(any::<u32>().prop_map(f32::from_bits), 0..200)
}

pub fn node_chunk() -> impl Strategy<Value = NodeChunk> {
    (any::<u64>(), node(), any::<u32>(), floats()).prop_map(|(round, node, chunk, data)| NodeChunk {
        round,
        node,
        chunk,
        data,
    })
}

pub fn node_report() -> impl Strategy<Value = NodeReport> {
    let node = (0u8..6, any::<u32>()).prop_map(|(level, index)| NodeId { level, index: index % (1 << 10) });
    (
        work(),
        node,
        any::<f64>(),
        any::<u32>(),
        any::<u64>(),
        (option::of(duration()), duration()),
        option::of(finding()),
    )
        .prop_map(|(work, node, loss, samples, seed, (compute, waited), finding)| NodeReport {
            work,
            node,
            loss,
            samples,
            digests: node.leaves().map(|leaf| Digest::of(&(u64::from(leaf) ^ seed).to_le_bytes())).collect(),
            compute,
            waited,
            gradient: (seed % 2 == 0).then(|| Digest::of(&seed.to_le_bytes())),
            finding,
        })
}

pub fn computed() -> impl Strategy<Value = FromWorker> {
    (work(), node(), duration()).prop_map(|(work, node, compute)| FromWorker::Computed { work, node, compute })
}

fn finding() -> impl Strategy<Value = Finding> {
    (any::<u32>(), vec(any::<u32>(), 0..=MAX_NAMED_SAMPLES), any::<f64>(), any::<Option<(u32, u32)>>())
        .prop_map(|(leaf, samples, loss, tensors)| Finding { leaf, samples, loss, tensors })
}

/// What a worker sends in a session.
pub fn session_message() -> impl Strategy<Value = FromWorker> {
    prop_oneof![
        Just(FromWorker::Heartbeat),
        (1u32.., shard_of(1 << 16)).prop_map(|(list, shard)| FromWorker::Cached { list, shard }),
        Just(FromWorker::Drain),
        text().prop_map(|reason| FromWorker::Failed { reason }),
    ]
}

/// What a coordinator sends in a session of a run with 8 shards, besides assignments.
pub fn session_answer() -> impl Strategy<Value = ToWorker> {
    prop_oneof![
        (1u32.., vec(shard_of(8), 0..20)).prop_map(|(list, shards)| ToWorker::Keep(KeepList { list, shards })),
        text().prop_map(|reason| ToWorker::Evicted { reason }),
        text().prop_map(|reason| ToWorker::Finished { reason }),
    ]
}

fn state() -> impl Strategy<Value = RunState> {
    prop_oneof![
        text().prop_map(|reason| RunState::Waiting { reason }),
        Just(RunState::Training),
        Just(RunState::Evaluating),
        text().prop_map(|reason| RunState::Finished { reason }),
    ]
}

fn round_report() -> impl Strategy<Value = RoundReport> {
    let counts = (any::<(u64, u32, u32)>(), shown(), shown(), any::<u32>(), any::<(u32, u32, bool)>());
    (counts, digest(), duration(), breakdown()).prop_map(
        |(
            ((round, epoch, batch), loss, gradient_norm, samples, (workers, hedged, skipped)),
            parameters,
            duration,
            breakdown,
        )| {
            RoundReport {
                round,
                epoch,
                batch,
                loss,
                gradient_norm,
                samples,
                parameters,
                workers,
                hedged,
                skipped,
                duration,
                breakdown,
            }
        },
    )
}

fn breakdown() -> impl Strategy<Value = Breakdown> {
    (duration(), duration(), duration(), duration(), duration())
        .prop_map(|(compute, transfer, reduce, update, wait)| Breakdown { compute, transfer, reduce, update, wait })
}

/// Any float but a negative zero, which monitors may not see.
fn shown() -> impl Strategy<Value = f64> {
    any::<f64>().prop_map(|value| value + 0.0)
}

pub fn event() -> impl Strategy<Value = TimedEvent> {
    let event = prop_oneof![
        round_report().prop_map(Event::Round),
        (any::<u32>(), any::<u64>(), shown(), any::<Option<f64>>()).prop_map(
            |(epoch, rounds, train_loss, validation_loss)| {
                Event::Epoch(EpochReport { epoch, rounds, train_loss, validation_loss })
            }
        ),
        (member(), text()).prop_map(|(member, name)| Event::Joined { member, name }),
        (member(), text()).prop_map(|(member, reason)| Event::Left { member, reason }),
        state().prop_map(|state| Event::State { state }),
        text().prop_map(|message| Event::Notice { message }),
    ];
    (any::<u64>(), event).prop_map(|(unix_ms, event)| TimedEvent { unix_ms, event })
}

pub fn run_status() -> impl Strategy<Value = RunStatus> {
    (
        (text(), text(), text(), state()),
        (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), shown()),
        any::<(u32, u32, u32, u32, u32)>(),
        any::<(Option<f64>, Option<f64>, Option<f64>)>(),
        vec(text(), 0..3),
    )
        .prop_map(|((run, model, version, state), longs, ints, losses, problems)| RunStatus {
            run,
            model,
            parameters: longs.0,
            state,
            rounds: longs.1,
            total_rounds: longs.2,
            rounds_per_epoch: ints.0,
            batch_size: ints.1,
            shards: ints.2,
            workers: ints.3,
            min_workers: ints.4,
            samples_seen: longs.3,
            samples_per_second: longs.4,
            loss: losses.0,
            train_loss: losses.1,
            validation_loss: losses.2,
            problems,
            version,
        })
}

fn transport() -> impl Strategy<Value = Transport> {
    prop_oneof![Just(Transport::InProcess), Just(Transport::SharedMemory), Just(Transport::Grpc)]
}

pub fn worker_status() -> impl Strategy<Value = WorkerStatus> {
    let counts = any::<(u32, u32, u64, u64)>();
    let times = (option::of(duration()), option::of(duration()), duration());
    (member(), (text(), text(), transport()), counts, vec(any::<u32>(), 0..9), times).prop_map(
        |(member, (name, isa, transport), counts, leaves, (last_compute, leaf_time, silent_for))| {
            let (threads, cached_shards, leaves_computed, leaves_hedged) = counts;
            WorkerStatus {
                member,
                name,
                isa,
                threads,
                transport,
                leaves,
                cached_shards,
                leaves_computed,
                last_compute,
                leaf_time,
                leaves_hedged,
                silent_for,
            }
        },
    )
}
