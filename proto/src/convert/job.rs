//! What a worker is told when it joins, and what it says of itself.

use std::num::NonZeroU32;
use std::time::Duration;

use lockstep_common::data::Dtype;
use lockstep_common::fingerprint::Fingerprints;
use lockstep_common::hash::Digest;
use lockstep_common::kernel::{Compute, Precision};
use lockstep_common::model::LayoutHash;
use lockstep_common::nn::Loss;
use lockstep_common::protocol::{Job, JoinRequest, SharedMemory, Welcome};
use lockstep_common::reduce::Tree;
use lockstep_common::shape::Shape;
use lockstep_common::shard::Schedule;
use lockstep_common::shared_memory::{MAX_SLOTS, Offer};

use super::identity::nonzero;
use super::{At, WireEnum, at_most, clip, digest, digest_bytes, micros, required, text, wire_enum};
use crate::limits::{MAX_SAMPLE_ELEMENTS, MAX_TEXT_BYTES};
use crate::v1;
use crate::wire_error::{Fault, WireError};

wire_enum!(Dtype, U8, F32);
wire_enum!(Loss, Mse, BinaryCrossentropy);
wire_enum!(Precision, F32, Bf16);
wire_enum!(Compute, F32, Bf16, Bf16Amx);

/// Bytes of one sample of the job's data set, as it travels.
pub fn sample_bytes(job: &Job) -> usize {
    job.sample_shape.elements() * job.dtype.size_bytes()
}

impl From<&Schedule> for v1::Schedule {
    fn from(schedule: &Schedule) -> Self {
        Self {
            seed: schedule.seed,
            samples: schedule.samples.get(),
            batch_size: schedule.batch_size.get(),
            shards: schedule.tree.shards(),
            shuffle: schedule.shuffle,
        }
    }
}

impl TryFrom<v1::Schedule> for Schedule {
    type Error = WireError;

    fn try_from(schedule: v1::Schedule) -> Result<Self, WireError> {
        const M: &str = "Schedule";
        let nonzero = |value: u32| NonZeroU32::new(value).ok_or(Fault::Zero);
        Ok(Self {
            seed: schedule.seed,
            samples: nonzero(schedule.samples).at(M, "samples")?,
            batch_size: nonzero(schedule.batch_size).at(M, "batch_size")?,
            tree: Tree::over(schedule.shards)
                .ok_or(Fault::NotAShardCount { value: schedule.shards })
                .at(M, "shards")?,
            shuffle: schedule.shuffle,
        })
    }
}

impl From<&Job> for v1::Job {
    fn from(job: &Job) -> Self {
        Self {
            run: job.run.clone(),
            model: Some((&job.model).into()),
            layout: job.layout.0,
            loss: v1::Loss::from(job.loss).into(),
            schedule: Some((&job.schedule).into()),
            validation_samples: job.validation_samples,
            sample_shape: Some((&job.sample_shape).into()),
            dtype: v1::Dtype::from(job.dtype).into(),
            compute: v1::Compute::from(job.compute).into(),
            wire: v1::Precision::from(job.wire).into(),
        }
    }
}

impl TryFrom<v1::Job> for Job {
    type Error = WireError;

    fn try_from(job: v1::Job) -> Result<Self, WireError> {
        const M: &str = "Job";
        let sample_shape: Shape = required(M, "sample_shape", job.sample_shape)?;
        let elements = sample_shape.checked_elements().map_or(u64::MAX, |elements| elements as u64);
        at_most(elements, MAX_SAMPLE_ELEMENTS as u64, " elements").at(M, "sample_shape")?;
        Ok(Self {
            run: text(job.run).at(M, "run")?,
            model: required(M, "model", job.model)?,
            layout: LayoutHash(job.layout),
            loss: Loss::from_wire(job.loss).at(M, "loss")?,
            schedule: required(M, "schedule", job.schedule)?,
            validation_samples: job.validation_samples,
            sample_shape,
            dtype: Dtype::from_wire(job.dtype).at(M, "dtype")?,
            compute: Compute::from_wire(job.compute).at(M, "compute")?,
            wire: Precision::from_wire(job.wire).at(M, "wire")?,
        })
    }
}

impl From<JoinRequest> for v1::Join {
    fn from(join: JoinRequest) -> Self {
        Self {
            process: join.process,
            name: clip(join.name, MAX_TEXT_BYTES),
            version: clip(join.version, MAX_TEXT_BYTES),
            fingerprint: digest_bytes(join.fingerprints.f32),
            bf16_fingerprint: digest_bytes(join.fingerprints.bf16),
            bf16_amx_fingerprint: digest_bytes(join.fingerprints.bf16_amx),
            threads: join.threads,
            isa: clip(join.isa, MAX_TEXT_BYTES),
        }
    }
}

impl TryFrom<v1::Join> for JoinRequest {
    type Error = WireError;

    fn try_from(join: v1::Join) -> Result<Self, WireError> {
        const M: &str = "Join";
        nonzero(join.threads).at(M, "threads")?;
        Ok(Self {
            process: join.process,
            name: text(join.name).at(M, "name")?,
            version: text(join.version).at(M, "version")?,
            fingerprints: Fingerprints {
                f32: digest(&join.fingerprint).at(M, "fingerprint")?,
                bf16: digest(&join.bf16_fingerprint).at(M, "bf16_fingerprint")?,
                bf16_amx: digest(&join.bf16_amx_fingerprint).at(M, "bf16_amx_fingerprint")?,
            },
            threads: join.threads,
            isa: text(join.isa).at(M, "isa")?,
        })
    }
}

impl From<&Welcome> for v1::Welcome {
    fn from(welcome: &Welcome) -> Self {
        Self {
            member: Some(welcome.member.into()),
            job: Some((&welcome.job).into()),
            heartbeat_interval_micros: micros(welcome.heartbeat_interval),
            shared_memory: welcome.shared_memory.as_deref().map(|&memory| memory.into()),
        }
    }
}

impl From<SharedMemory> for v1::SharedMemory {
    fn from(SharedMemory { parameters, gradients }: SharedMemory) -> Self {
        Self { parameters: Some(parameters.into()), gradients: Some(gradients.into()) }
    }
}

impl TryFrom<v1::SharedMemory> for SharedMemory {
    type Error = WireError;

    fn try_from(memory: v1::SharedMemory) -> Result<Self, WireError> {
        const M: &str = "SharedMemory";
        Ok(Self {
            parameters: required(M, "parameters", memory.parameters)?,
            gradients: required(M, "gradients", memory.gradients)?,
        })
    }
}

impl From<Offer> for v1::SharedRegion {
    fn from(Offer { process, descriptor, token, slots }: Offer) -> Self {
        Self { process, descriptor, token: digest_bytes(Digest(token)), slots }
    }
}

impl TryFrom<v1::SharedRegion> for Offer {
    type Error = WireError;

    fn try_from(region: v1::SharedRegion) -> Result<Self, WireError> {
        const M: &str = "SharedRegion";
        let v1::SharedRegion { process, descriptor, token, slots } = region;
        nonzero(slots).at(M, "slots")?;
        at_most(slots.into(), MAX_SLOTS.into(), "").at(M, "slots")?;
        Ok(Self { process, descriptor, token: digest(&token).at(M, "token")?.0, slots })
    }
}

impl TryFrom<v1::Welcome> for Welcome {
    type Error = WireError;

    fn try_from(welcome: v1::Welcome) -> Result<Self, WireError> {
        const M: &str = "Welcome";
        if welcome.heartbeat_interval_micros == 0 {
            return Err(WireError::new(M, "heartbeat_interval_micros", Fault::Zero));
        }
        Ok(Self {
            member: required(M, "member", welcome.member)?,
            job: required(M, "job", welcome.job)?,
            heartbeat_interval: Duration::from_micros(welcome.heartbeat_interval_micros),
            shared_memory: match welcome.shared_memory {
                Some(_) => Some(Box::new(required(M, "shared_memory", welcome.shared_memory)?)),
                None => None,
            },
        })
    }
}
