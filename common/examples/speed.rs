use lockstep_common::*;
use nn::*;
struct Src(Vec<f32>, usize, usize);
impl LeafSource for Src {
    fn samples(&self, _: u32) -> u32 {
        self.2 as u32
    }
    fn write(&self, leaf: u32, i: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.0[(leaf as usize * self.2 + i) * self.1..][..self.1])
    }
}
fn main() {
    let mut a = std::env::args().skip(1);
    let name = a.next().unwrap();
    let isa = kernel::Isa::parse(&a.next().unwrap()).unwrap();
    let threads: usize = a.next().unwrap().parse().unwrap();
    let m = model::preset(&name).unwrap().resolve().unwrap();
    let net = Network::new(&m, Loss::Mse, isa);
    let p = initial_parameters(&m.layout, 1);
    let mut s = rng::Stream::new(1, rng::Purpose::SelfTest, 0, 0);
    let n = net.input_elements();
    let src = Src(
        (0..256 * n)
            .map(|_| {
                let v = s.uniform();
                if v > 0.8 { v } else { 0.0 }
            })
            .collect(),
        n,
        16,
    );
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let bufs = Buffers::default();
    let mut packed = vec![0.0; net.packed_len()];
    let mut ts = vec![];
    let mut h = hash::Digest(0);
    for _ in 0..if name == "wide" { 15 } else { 30 } {
        let t = std::time::Instant::now();
        net.pack(&p, &mut packed);
        let tp = t.elapsed();
        let r = pool.install(|| {
            subtree(
                &net,
                Weights { parameters: &p, packed: &packed },
                reduce::Tree::over(16).unwrap().root(),
                &src,
                &bufs,
            )
        });
        ts.push((t.elapsed(), tp));
        h = hash::Digest::of_floats(&r.gradient);
        bufs.recycle(r.gradient);
    }
    ts.sort();
    let m = ts[ts.len() / 2];
    println!(
        "{name} {isa} {threads}: {:.0} samples/s, pass {}, pack {:?}, {:.1} GFLOP/s, {h}",
        256.0 / m.0.as_secs_f64(),
        net.pass_samples(),
        m.1,
        256.0 / m.0.as_secs_f64() * net.training_flops() as f64 / 1e9
    );
}
