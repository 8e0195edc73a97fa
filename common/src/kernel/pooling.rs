//! Pooling and up-sampling of NHWC images.

use super::contraction::PixelRelation;
use super::lists::Lists;
use super::per_isa::per_isa;

/// Channels that are taken at a time: a vector of AVX-512, two of AVX2.
const LANES: usize = 16;

/// For every output pixel, the input pixels of its window, in row order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    lists: Lists,
    /// Input pixels that are in no window.
    outside: Vec<u32>,
    /// Whether an input pixel is in several windows.
    overlap: bool,
}

impl Windows {
    /// The windows of a pooling layer: the low image is the output.
    pub fn new(relation: &PixelRelation) -> Self {
        let mut windows = vec![Vec::new(); relation.low.rows * relation.low.columns];
        relation.for_each(|high, low, tap| windows[low].push((tap, high as u32)));
        windows.iter_mut().for_each(|window| window.sort_unstable());
        let mut times = vec![0; relation.high.rows * relation.high.columns];
        windows.iter().flatten().for_each(|&(_, pixel)| times[pixel as usize] += 1);
        Self {
            lists: windows.into_iter().map(|window| window.into_iter().map(|(_, pixel)| pixel)).collect(),
            outside: (0..).zip(&times).filter(|&(_, &times)| times == 0).map(|(pixel, _)| pixel).collect(),
            overlap: times.iter().any(|&times| times > 1),
        }
    }

    fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.lists.iter()
    }
}

#[inline(always)]
fn pixel(values: &[f32], index: u32, channels: usize) -> &[f32] {
    &values[index as usize * channels..][..channels]
}

#[inline(always)]
fn pixel_mut(values: &mut [f32], index: u32, channels: usize) -> &mut [f32] {
    &mut values[index as usize * channels..][..channels]
}

/// The largest values of the usual window, two by two, as many channels at a time as a vector has lanes: loops over arrays
/// are what the compiler makes vectors of. Returns how many channels are done.
#[inline(always)]
fn largest_of_four(window: &[u32], input: &[f32], output: &mut [f32], winners: &mut [u32]) -> usize {
    let &[a, b, c, d] = window else { return 0 };
    let channels = output.len();
    let (a, _) = pixel(input, a, channels).as_chunks::<LANES>();
    let (b, _) = pixel(input, b, channels).as_chunks::<LANES>();
    let (c, _) = pixel(input, c, channels).as_chunks::<LANES>();
    let (d, _) = pixel(input, d, channels).as_chunks::<LANES>();
    let (output, _) = output.as_chunks_mut::<LANES>();
    let (winners, _) = winners.as_chunks_mut::<LANES>();
    for i in 0..output.len() {
        for lane in 0..LANES {
            let (best, winner) = larger(b[i][lane], 1, a[i][lane], 0);
            let (best, winner) = larger(c[i][lane], 2, best, winner);
            (output[i][lane], winners[i][lane]) = larger(d[i][lane], 3, best, winner);
        }
    }
    output.len() * LANES
}

/// The larger value with its place. The first of equals stays; a NaN replaces what was there, so that it stays visible.
#[inline(always)]
fn larger(value: f32, place: u32, best: f32, winner: u32) -> (f32, u32) {
    let larger = value > best || value.is_nan();
    (if larger { value } else { best }, if larger { place } else { winner })
}

/// What the winners of a window get: for each channel the gradient, the winner, and what gates them.
#[derive(Clone, Copy)]
struct Shares<'a> {
    gradient: &'a [f32],
    winners: &'a [u32],
    gate: Option<&'a [f32]>,
}

impl Shares<'_> {
    /// What the usual window's elements get, none of which is in another window; as [`largest_of_four`].
    #[inline(always)]
    fn write_four<const GATED: bool>(self, window: &[u32], input_gradient: &mut [f32]) -> usize {
        let &[a, b, c, d] = window else { return 0 };
        let channels = self.gradient.len();
        let places = [a, b, c, d].map(|index| index as usize * channels..(index as usize + 1) * channels);
        let Ok([a, b, c, d]) = input_gradient.get_disjoint_mut(places) else { return 0 };
        let (a, _) = a.as_chunks_mut::<LANES>();
        let (b, _) = b.as_chunks_mut::<LANES>();
        let (c, _) = c.as_chunks_mut::<LANES>();
        let (d, _) = d.as_chunks_mut::<LANES>();
        let (gradient, _) = self.gradient.as_chunks::<LANES>();
        let (winners, _) = self.winners.as_chunks::<LANES>();
        let (gate, _) = self.gate.unwrap_or(self.gradient).as_chunks::<LANES>();
        for i in 0..gradient.len() {
            for lane in 0..LANES {
                let share = if GATED && gate[i][lane] <= 0.0 { 0.0 } else { 0.0 + gradient[i][lane] };
                let of_place = |place| if winners[i][lane] == place { share } else { 0.0 };
                (a[i][lane], b[i][lane]) = (of_place(0), of_place(1));
                (c[i][lane], d[i][lane]) = (of_place(2), of_place(3));
            }
        }
        gradient.len() * LANES
    }

    /// The same from a channel on.
    #[inline(always)]
    fn from(self, channel: usize) -> Self {
        let Self { gradient, winners, gate } = self;
        Self { gradient: &gradient[channel..], winners: &winners[channel..], gate: gate.map(|gate| &gate[channel..]) }
    }

    /// What the element at `place` of the window gets is added to `target`, or written there.
    #[inline(always)]
    fn give<const ADD: bool>(self, place: u32, target: &mut [f32]) {
        let (gated, gate) = (self.gate.is_some(), self.gate.unwrap_or(self.gradient));
        let shares = self.gradient.iter().zip(self.winners).zip(gate);
        for (target, ((gradient, winner), gate)) in target.iter_mut().zip(shares) {
            let share = if *winner != place || (gated && *gate <= 0.0) { 0.0 } else { *gradient };
            *target = if ADD { *target } else { 0.0 } + share;
        }
    }
}

per_isa! {
    /// One sample's max pooling. `winners` gets, for every output, which element of its window was the largest; the
    /// first of equals wins. Windows are never empty.
    pub fn max_pool(windows: &Windows, input: &[f32], output: &mut [f32], winners: &mut [u32], channels: usize) {
        let outputs = output.chunks_exact_mut(channels).zip(winners.chunks_exact_mut(channels));
        for (window, (output, winners)) in windows.iter().zip(outputs) {
            let done = largest_of_four(window, input, output, winners);
            if done == channels {
                continue;
            }
            let (output, winners) = (&mut output[done..], &mut winners[done..]);
            output.copy_from_slice(&pixel(input, window[0], channels)[done..]);
            winners.fill(0);
            for (place, &index) in window.iter().enumerate().skip(1) {
                let values = &pixel(input, index, channels)[done..];
                for ((output, winner), &value) in output.iter_mut().zip(winners.iter_mut()).zip(values) {
                    (*output, *winner) = larger(value, place as u32, *output, *winner);
                }
            }
        }
    }

    /// Backward pass of [`max_pool`]: the winner gets the gradient. With a `gate`, the output of the pooling, it gets it
    /// only where that is above 0: this is also the backward pass of a relu before the pooling, since the output of the
    /// pooling is the winner's.
    pub fn max_pool_backward(
        windows: &Windows,
        output_gradient: &[f32],
        winners: &[u32],
        gate: Option<&[f32]>,
        input_gradient: &mut [f32],
        channels: usize,
    ) {
        if windows.overlap {
            input_gradient.fill(0.0);
        } else {
            for &index in &windows.outside {
                pixel_mut(input_gradient, index, channels).fill(0.0);
            }
        }
        for (i, window) in windows.iter().enumerate() {
            let here = i * channels..(i + 1) * channels;
            let shares = Shares {
                gradient: &output_gradient[here.clone()],
                winners: &winners[here.clone()],
                gate: gate.map(|gate| &gate[here]),
            };
            let done = match (windows.overlap, gate) {
                (true, _) => 0,
                (false, Some(_)) => shares.write_four::<true>(window, input_gradient),
                (false, None) => shares.write_four::<false>(window, input_gradient),
            };
            if done == channels {
                continue;
            }
            let shares = shares.from(done);
            for (place, &index) in (0..).zip(window) {
                let target = &mut pixel_mut(input_gradient, index, channels)[done..];
                if windows.overlap {
                    shares.give::<true>(place, target);
                } else {
                    shares.give::<false>(place, target);
                }
            }
        }
    }

    /// One sample's average pooling: the sum over the window in row order, times 1 / its size.
    pub fn average_pool(windows: &Windows, input: &[f32], output: &mut [f32], channels: usize) {
        for (window, output) in windows.iter().zip(output.chunks_exact_mut(channels)) {
            output.copy_from_slice(pixel(input, window[0], channels));
            for &index in &window[1..] {
                for (output, value) in output.iter_mut().zip(pixel(input, index, channels)) {
                    *output += value;
                }
            }
            let scale = 1.0 / window.len() as f32;
            output.iter_mut().for_each(|output| *output *= scale);
        }
    }

    /// Backward pass of [`average_pool`].
    pub fn average_pool_backward(
        windows: &Windows,
        output_gradient: &[f32],
        input_gradient: &mut [f32],
        channels: usize,
    ) {
        input_gradient.fill(0.0);
        for (window, gradient) in windows.iter().zip(output_gradient.chunks_exact(channels)) {
            let scale = 1.0 / window.len() as f32;
            for &index in window {
                let target = pixel_mut(input_gradient, index, channels);
                for (target, &gradient) in target.iter_mut().zip(gradient) {
                    *target = gradient.mul_add(scale, *target);
                }
            }
        }
    }

    /// One sample's up-sampling by repetition: `windows` are those of the pooling that would undo it.
    pub fn up_sample(windows: &Windows, input: &[f32], output: &mut [f32], channels: usize) {
        for (window, value) in windows.iter().zip(input.chunks_exact(channels)) {
            for &index in window {
                pixel_mut(output, index, channels).copy_from_slice(value);
            }
        }
    }

    /// Backward pass of [`up_sample`]: the sum over the copies in row order.
    pub fn up_sample_backward(
        windows: &Windows,
        output_gradient: &[f32],
        input_gradient: &mut [f32],
        channels: usize,
    ) {
        for (window, target) in windows.iter().zip(input_gradient.chunks_exact_mut(channels)) {
            // Nobody reads the copies of a pixel in a part of the output that is not computed.
            let Some((&first, others)) = window.split_first() else {
                target.fill(0.0);
                continue;
            };
            target.copy_from_slice(pixel(output_gradient, first, channels));
            for &index in others {
                for (target, gradient) in target.iter_mut().zip(pixel(output_gradient, index, channels)) {
                    *target += gradient;
                }
            }
        }
    }
}
