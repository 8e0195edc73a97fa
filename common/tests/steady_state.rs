//! In the steady state, computing takes no memory: an allocator that counts sees none asked for.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use lockstep_common::kernel::{Arithmetic, Compute, Isa};
use lockstep_common::model;
use lockstep_common::nn::{
    Buffers, LeafSource, Loss, Network, Weights, ZeroProducts, evaluate, initial_parameters, subtree,
};
use lockstep_common::reduce::{NodeId, Tree};

/// The system's allocator, counting.
struct Counting;

/// Calls that asked for memory, on all threads.
static CALLS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Every leaf has these many samples, which are all alike.
struct Alike(u32);

impl LeafSource for Alike {
    fn samples(&self, _: u32) -> u32 {
        self.0
    }

    fn write(&self, leaf: u32, i: usize, out: &mut [f32]) {
        out.fill((leaf as usize + i) as f32 / 64.0);
    }
}

/// Scenario: the sum over four leaves of each preset, and their loss, are computed again and again by one thread; the
/// memory of each sum is given back. Property: from the second time on, nobody asks for memory. (With more threads, how
/// many leaves are under way at once is a matter of luck, and so is when the last buffer is made.)
#[test]
fn rounds_after_the_first_ask_for_no_memory() {
    let tree = Tree::over(4).expect("a power of two");
    let presets = ["conv", "article", "dense"];
    for (preset, compute) in presets.into_iter().flat_map(|preset| Compute::ALL.map(|compute| (preset, compute))) {
        let model = model::preset(preset).expect("a preset").resolve().expect("a valid model");
        let network = Network::new(&model, Loss::Mse, Arithmetic { isa: Isa::best(), compute })
            .with_zero_products(ZeroProducts::LeftOut);
        let parameters = initial_parameters(&model.layout, 1);
        let mut packed = vec![0.0; network.packed_len()];
        let buffers = Buffers::default();
        let source = Alike(5);
        let mut round = |node: NodeId| {
            network.pack(&parameters, &mut packed);
            let weights = Weights { parameters: &parameters, packed: &packed };
            let sum = subtree(&network, weights, node, &source, &buffers);
            let loss = evaluate(&network, weights, node, &source, &buffers).loss;
            buffers.recycle(sum.gradient);
            (sum.loss, loss)
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
        pool.install(|| {
            let first = round(tree.root());
            let before = CALLS.load(Ordering::Relaxed);
            for _ in 0..3 {
                assert_eq!(round(tree.root()), first);
            }
            let asked = CALLS.load(Ordering::Relaxed) - before;
            assert_eq!(asked, 0, "{preset} in {compute}: memory was asked for {asked} times in three rounds");
        });
    }
}
