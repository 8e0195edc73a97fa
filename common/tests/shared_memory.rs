//! Memory that processes share: here, by opening it twice in one.
#![cfg(target_os = "linux")]

use std::sync::{Arc, Mutex};

use lockstep_common::shared_memory::{Access, Offer, Region};

fn region(slots: u32, floats: usize, access: Access) -> Arc<Region> {
    Arc::new(Region::create(slots, floats, access).expect("shared memory"))
}

fn open(offer: Offer, floats: usize, access: Access) -> Result<Arc<Region>, String> {
    Region::open(offer, floats, access).map(Arc::new).map_err(|error| error.to_string())
}

#[test]
fn what_one_side_writes_the_other_reads() {
    for access in [Access::Read, Access::Write] {
        let ours = region(3, 1025, access);
        let theirs = open(ours.offer(), 1025, access).unwrap();
        let (writes, reads) = if access == Access::Read { (&ours, &theirs) } else { (&theirs, &ours) };
        for number in 0..3 {
            let mut slot = writes.claim(number).unwrap();
            assert!(slot.iter().all(|value| value.to_bits() == 0));
            slot.iter_mut().zip(0..).for_each(|(value, i)| *value = (number * 10_000 + i) as f32);
            let seen = reads.claim(number).unwrap();
            assert_eq!((seen[0], seen[1024]), ((number * 10_000) as f32, (number * 10_000 + 1024) as f32));
            assert_eq!(seen.len(), 1025);
        }
    }
}

#[test]
fn a_slot_has_one_holder_and_its_release_is_told() {
    let region = region(2, 1, Access::Write);
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = told.clone();
    region.on_release(move |slot| tell.lock().unwrap().push(slot));
    let (first, second) = (region.take().unwrap(), region.take().unwrap());
    assert_eq!((first.number(), second.number()), (0, 1));
    assert!(region.take().is_none() && region.claim(1).is_none());
    assert!(region.claim(2).is_none() && region.claim(64).is_none() && region.claim(u32::MAX).is_none());
    drop(second);
    assert_eq!(*told.lock().unwrap(), [1]);
    assert_eq!(region.take().unwrap().number(), 1);
    drop(first);
    assert_eq!(*told.lock().unwrap(), [1, 1, 0]);
}

#[test]
fn what_is_not_the_offered_memory_is_not_mapped() {
    let ours = region(2, 100, Access::Read);
    let offer = ours.offer();
    let refused = |offer, floats, access| open(offer, floats, access).unwrap_err();
    assert!(refused(Offer { token: 1, ..offer }, 100, Access::Read).contains("another token"));
    assert!(refused(Offer { slots: 3, ..offer }, 100, Access::Read).contains("another length"));
    assert!(refused(offer, 5000, Access::Read).contains("another length"));
    assert!(refused(Offer { slots: 65, ..offer }, 100, Access::Read).contains("65 slots"));
    assert!(refused(offer, usize::MAX / 2, Access::Read).contains("cannot be"));
    let file = tempfile::tempfile().unwrap();
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&file) as u32;
    assert!(refused(Offer { descriptor, ..offer }, 100, Access::Read).contains("no shared memory"));
    assert!(refused(Offer { descriptor: 9999, ..offer }, 100, Access::Read).contains("No such file"));
    // Linux has no process 0.
    assert!(refused(Offer { process: 0, ..offer }, 100, Access::Read).contains("No such file"));
    // A memory file whose length its maker could change.
    let loose = rustix::fs::memfd_create("lockstep", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&loose, 3 * 4096).unwrap();
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&loose) as u32;
    assert!(refused(Offer { descriptor, ..offer }, 100, Access::Read).contains("not sealed"));
}

#[test]
fn readers_cannot_write_and_nobody_can_change_the_length() {
    let ours = region(1, 8, Access::Read);
    let refused = open(ours.offer(), 8, Access::Write).unwrap_err();
    assert!(refused.contains("cannot map"), "{refused}");
    let theirs = open(ours.offer(), 8, Access::Read).unwrap();
    let mut slot = theirs.claim(0).unwrap();
    let write = std::panic::AssertUnwindSafe(|| slot[0] = 1.0);
    assert!(std::panic::catch_unwind(write).is_err(), "a panic, not a signal");
    let path = format!("/proc/self/fd/{}", ours.offer().descriptor);
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    assert!(file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
}
