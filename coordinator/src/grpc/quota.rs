//! How many connections, joins and watchers there may be: in total, and from one address.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use lockstep_proto::limits::Rate;

/// What counts as one address: an IPv4 address, or the 64 bits of an IPv6 network, of which whoever has one has all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Origin(IpAddr);

impl From<IpAddr> for Origin {
    fn from(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
            address => address,
        })
    }
}

/// How many there may be at a time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Most {
    pub(super) total: usize,
    pub(super) per_origin: usize,
}

/// Places that are taken and given back.
#[derive(Debug)]
pub(super) struct Places {
    most: Most,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    by_origin: HashMap<Origin, usize>,
}

impl Places {
    pub(super) fn new(most: Most) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::default() })
    }

    /// Takes a place; `None` if there is none left.
    pub(super) fn take(self: &Arc<Self>, origin: Origin) -> Option<Place> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let from_there = taken.by_origin.get(&origin).copied().unwrap_or(0);
        if taken.total >= self.most.total || from_there >= self.most.per_origin {
            return None;
        }
        taken.total += 1;
        taken.by_origin.insert(origin, from_there + 1);
        Some(Place { places: self.clone(), origin })
    }
}

/// A place, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    origin: Origin,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.total -= 1;
        // Who has none left is forgotten, so that the map is never larger than the number of places.
        if let Entry::Occupied(mut entry) = taken.by_origin.entry(self.origin) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

/// How often something may happen: buckets of tokens, filled as time passes.
#[derive(Debug)]
pub(super) struct Pace {
    whole: Rate,
    per_origin: Rate,
    buckets: Mutex<Buckets>,
}

#[derive(Debug)]
struct Buckets {
    whole: Bucket,
    by_origin: HashMap<Origin, Bucket>,
}

/// What is left at a moment.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    level: f64,
    at: Instant,
}

impl Bucket {
    fn full(rate: Rate, now: Instant) -> Self {
        Self { level: f64::from(rate.burst), at: now }
    }

    fn filled(self, rate: Rate, now: Instant) -> Self {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * f64::from(rate.per_second);
        Self { level: (self.level + gained).min(f64::from(rate.burst)), at: now }
    }

    fn drained(self) -> Option<Self> {
        (self.level >= 1.0).then_some(Self { level: self.level - 1.0, ..self })
    }
}

/// Buckets above which full ones, which say nothing, are thrown away.
const TIDY_ABOVE: usize = 4096;

impl Pace {
    pub(super) fn new(whole: Rate, per_origin: Rate) -> Self {
        let buckets = Buckets { whole: Bucket::full(whole, Instant::now()), by_origin: HashMap::new() };
        Self { whole, per_origin, buckets: Mutex::new(buckets) }
    }

    /// Whether it may happen now; it counts if it may.
    pub(super) fn allows(&self, origin: Origin, now: Instant) -> bool {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.by_origin.len() > TIDY_ABOVE {
            // Those that stay took a token of the whole in the time that one takes to fill up: the map stays small.
            let (rate, burst) = (self.per_origin, f64::from(self.per_origin.burst));
            buckets.by_origin.retain(|_, bucket| bucket.filled(rate, now).level < burst);
        }
        let own = buckets.by_origin.get(&origin).copied().unwrap_or(Bucket::full(self.per_origin, now));
        let whole = buckets.whole.filled(self.whole, now).drained();
        let own = own.filled(self.per_origin, now).drained();
        let (Some(whole), Some(own)) = (whole, own) else { return false };
        buckets.whole = whole;
        buckets.by_origin.insert(origin, own);
        true
    }
}

/// A number of equal things, none of which belongs to anybody.
#[derive(Debug)]
pub(super) struct Slots {
    most: usize,
    taken: AtomicUsize,
}

impl Slots {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, taken: AtomicUsize::new(0) })
    }

    /// Takes one; `None` if all are taken.
    pub(super) fn take(self: &Arc<Self>) -> Option<SlotTaken> {
        let next = |taken: usize| (taken < self.most).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok()?;
        Some(SlotTaken(self.clone()))
    }
}

/// One of them, given back when it is dropped.
#[derive(Debug)]
pub(super) struct SlotTaken(Arc<Slots>);

impl Drop for SlotTaken {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn origin(address: &str) -> Origin {
        address.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn an_origin_is_an_address_or_a_network() {
        assert_eq!(origin("::ffff:10.0.0.1"), origin("10.0.0.1"));
        assert_eq!(origin("2001:db8::1"), origin("2001:db8::ffff:1"));
        assert_ne!(origin("2001:db8::1"), origin("2001:db8:0:1::1"));
        assert_ne!(origin("10.0.0.1"), origin("10.0.0.2"));
    }

    #[test]
    fn places_are_limited_and_come_back() {
        let places = Places::new(Most { total: 3, per_origin: 2 });
        let [one, two] = ["10.0.0.1", "10.0.0.2"].map(origin);
        let held = [places.take(one), places.take(one), places.take(two)];
        assert!(held.iter().all(Option::is_some));
        assert!(places.take(one).is_none() && places.take(two).is_none());
        drop(held);
        assert!(places.taken.lock().unwrap().by_origin.is_empty());
        let held = [places.take(one), places.take(one)];
        assert!(places.take(one).is_none() && places.take(two).is_some());
        drop(held);
        let slots = Slots::new(1);
        let held = slots.take();
        assert!(held.is_some() && slots.take().is_none());
        drop(held);
        assert!(slots.take().is_some());
    }

    #[test]
    fn a_pace_allows_bursts_and_no_more() {
        let pace = Pace::new(Rate { burst: 5, per_second: 10 }, Rate { burst: 3, per_second: 2 });
        let [one, two] = ["10.0.0.1", "10.0.0.2"].map(origin);
        let start = Instant::now();
        let count = |origin, after: f64| {
            let now = start + Duration::from_secs_f64(after);
            (0..10).filter(|_| pace.allows(origin, now)).count()
        };
        assert_eq!(count(one, 0.0), 3, "its own burst");
        assert_eq!(count(two, 0.0), 2, "what is left of the whole");
        assert_eq!(count(one, 1.0), 2, "two a second");
        assert_eq!(count(one, 1.0), 0);
        assert_eq!(count(one, 100.0), 3, "not more than a burst");
    }

    #[test]
    fn forgotten_origins_take_no_memory() {
        let many = Rate { burst: u32::MAX, per_second: u32::MAX };
        let pace = Pace::new(many, Rate { burst: 1, per_second: 1 });
        let start = Instant::now();
        for i in 0..20_000u32 {
            let origin = Origin::from(IpAddr::from(i.to_be_bytes()));
            assert!(pace.allows(origin, start + Duration::from_millis(i.into())));
        }
        assert!(pace.buckets.lock().unwrap().by_origin.len() <= TIDY_ABOVE + 1);
    }
}
