//! A picture of what a model does: strips of images above each other, originals over their reconstructions.
//!
//! ```text
//! o0 o1 o2 o3     the first `columns` originals
//! r0 r1 r2 r3     their reconstructions
//!
//! o4 o5           the next band
//! r4 r5
//! ```

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use png::{BitDepth, ColorType, Encoder};
use thiserror::Error;

use crate::shape::Shape;

/// The length in pixels that the longer side of a tile has at least: below it, details are hard to see on a screen.
const MIN_TILE_SIDE: usize = 56;

/// The pixels between neighbouring tiles and around the whole picture.
const TILE_GAP: usize = 2;

/// The pixels between bands, which must look further apart than the strips within one.
const BAND_GAP: usize = 8;

/// The value of every channel where there is no tile: white, to set dark images off.
const PAPER: u8 = 0xff;

/// The most bytes of an uncompressed picture: at three bytes a pixel, one of 16 columns of 512-pixel tiles and as many
/// rows takes 194 MiB.
const MAX_PICTURE_BYTES: usize = 256 << 20;

/// What can go wrong when a grid is drawn or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GridError {
    /// Samples of this shape do not say where a row of pixels ends, or have no pixels.
    #[error("samples of shape {shape} are not images: (height, width) or (height, width, channels) is needed")]
    NotAnImage {
        /// The shape given.
        shape: Shape,
    },
    /// There is nothing to draw.
    #[error("a grid of images needs at least one image")]
    NoImages,
    /// A strip does not hold whole images, or not as many as the first one.
    #[error("strip {strip} has {values} values, but {images} images of shape {shape} have {expected}")]
    StripLength {
        /// The number of the strip.
        strip: usize,
        /// The number of values in it.
        values: usize,
        /// The number of images that it should hold.
        images: usize,
        /// The shape of each.
        shape: Shape,
        /// The number of values that it should have.
        expected: usize,
    },
    /// The picture would be unreasonably large.
    #[error("a picture of {width}x{height} pixels is too large: at most {MAX_PICTURE_BYTES} bytes are drawn")]
    TooLarge {
        /// The width in pixels.
        width: usize,
        /// The height in pixels.
        height: usize,
    },
    /// The PNG encoder refused.
    #[error("cannot encode a grid of images as PNG")]
    Encode(#[from] png::EncodingError),
    /// The file could not be written or put in its place.
    #[error("cannot write the images to {}", path.display())]
    Write {
        /// The file that could not be written.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// What a grid looks like.
#[derive(Clone, Debug)]
pub struct GridSpec {
    /// The shape of each image: (height, width), (height, width, 1) for grey and (height, width, 3) for RGB. Of any
    /// other number of channels the first is shown in grey.
    pub shape: Shape,
    /// The most images side by side; more start another band.
    pub columns: NonZeroUsize,
}

/// Draws `strips` as a PNG and returns the file's bytes.
///
/// A strip is a batch of images, (images, height, width, channels) as one slice; all have as many images, and equal
/// numbers stand above each other. For `reconstructions.png` the strips are the originals and the reconstructions; a
/// denoising model has its corrupted input between them.
///
/// Values from 0 to 1 are spread over black to white and others clamped to that; NaN is black. Small images are
/// enlarged by a whole factor, each value to a square of pixels, until their longer side has 56 pixels or more.
///
/// # Errors
///
/// [`GridError::NotAnImage`] for shapes of fewer than two or more than three axes or without values,
/// [`GridError::NoImages`], [`GridError::StripLength`] and [`GridError::TooLarge`] (more than 256 MiB uncompressed).
pub fn grid_png(spec: &GridSpec, strips: &[&[f32]]) -> Result<Vec<u8>, GridError> {
    let layout = Layout::new(spec, strips)?;
    let mut file = Vec::new();
    let mut encoder = Encoder::new(&mut file, layout.width, layout.height);
    encoder.set_color(if layout.tile.shown_channels == 3 { ColorType::Rgb } else { ColorType::Grayscale });
    encoder.set_depth(BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&layout.draw(strips))?;
    writer.finish()?;
    Ok(file)
}

/// Draws `strips` as [`grid_png`] does and writes the file `path`, in place of any that was there. A reader sees the
/// old file or the new one, never a part: the new one is written beside it, as `path` with `.partial` appended.
///
/// # Errors
///
/// Those of [`grid_png`], and [`GridError::Write`].
pub fn write_grid_png(path: &Path, spec: &GridSpec, strips: &[&[f32]]) -> Result<(), GridError> {
    let file = grid_png(spec, strips)?;
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let written = fs::write(&partial, file).and_then(|()| fs::rename(&partial, path));
    written.map_err(|source| {
        // Best effort: the error to report is the first one.
        let _ = fs::remove_file(&partial);
        GridError::Write { path: path.to_owned(), source }
    })
}

/// One image and how it is shown.
#[derive(Clone, Copy, Debug)]
struct Tile {
    /// Of the image, in values.
    height: usize,
    width: usize,
    channels: usize,
    /// 1 or 3.
    shown_channels: usize,
    /// How many pixels a value is wide and high.
    scale: usize,
}

impl Tile {
    fn new(shape: &Shape) -> Option<Self> {
        let (height, width, channels) = match *shape.axes() {
            [height, width] => (height, width, 1),
            [height, width, channels] => (height, width, channels),
            _ => return None,
        };
        if shape.checked_elements()? == 0 {
            return None;
        }
        // The longer side decides, lest a single long row of pixels become a banner.
        let scale = MIN_TILE_SIDE.div_ceil(height.max(width));
        Some(Self { height, width, channels, shown_channels: if channels == 3 { 3 } else { 1 }, scale })
    }

    /// The number of values in an image.
    fn values(&self) -> usize {
        self.height * self.width * self.channels
    }
}

/// Where everything goes, in pixels.
#[derive(Clone, Copy, Debug)]
struct Layout {
    tile: Tile,
    /// Above each other in a band.
    strips: usize,
    /// Tiles side by side.
    columns: usize,
    /// Of the picture.
    width: u32,
    height: u32,
}

impl Layout {
    /// Checks that the strips fit the shape and each other, and the picture in memory.
    fn new(spec: &GridSpec, strips: &[&[f32]]) -> Result<Self, GridError> {
        let shape = &spec.shape;
        let tile = Tile::new(shape).ok_or_else(|| GridError::NotAnImage { shape: shape.clone() })?;
        let images = strips.first().map_or(0, |first| first.len().div_ceil(tile.values()));
        if images == 0 {
            return Err(GridError::NoImages);
        }
        let expected = images * tile.values();
        if let Some(strip) = strips.iter().position(|strip| strip.len() != expected) {
            let values = strips[strip].len();
            return Err(GridError::StripLength { strip, values, images, shape: shape.clone(), expected });
        }
        let columns = spec.columns.get().min(images);
        let bands = images.div_ceil(columns);
        // Only the product can overflow: the values are in memory, and one is at most 56 pixels wide and high.
        let width = TILE_GAP + columns * (tile.width * tile.scale + TILE_GAP);
        let band = strips.len() * (tile.height * tile.scale + TILE_GAP);
        let height = TILE_GAP + bands * band + (bands - 1) * BAND_GAP;
        let bytes = width.saturating_mul(height).saturating_mul(tile.shown_channels);
        match (u32::try_from(width), u32::try_from(height)) {
            (Ok(width), Ok(height)) if bytes <= MAX_PICTURE_BYTES => {
                Ok(Self { tile, strips: strips.len(), columns, width, height })
            }
            _ => Err(GridError::TooLarge { width, height }),
        }
    }

    /// Returns the picture's bytes, (height, width, shown channels).
    fn draw(&self, strips: &[&[f32]]) -> Vec<u8> {
        let picture_row = self.width as usize * self.tile.shown_channels;
        let mut picture = vec![PAPER; self.height as usize * picture_row];
        for (strip, values) in strips.iter().enumerate() {
            for (index, image) in values.chunks_exact(self.tile.values()).enumerate() {
                let (top, left) = self.corner(strip, index);
                let corner = top * picture_row + left * self.tile.shown_channels;
                self.draw_tile(image, &mut picture[corner..], picture_row);
            }
        }
        picture
    }

    /// The first row and column of pixels of an image's tile.
    fn corner(&self, strip: usize, index: usize) -> (usize, usize) {
        let (band, column) = (index / self.columns, index % self.columns);
        let tile_height = self.tile.height * self.tile.scale + TILE_GAP;
        let tile_width = self.tile.width * self.tile.scale + TILE_GAP;
        let top = TILE_GAP + band * (self.strips * tile_height + BAND_GAP) + strip * tile_height;
        (top, TILE_GAP + column * tile_width)
    }

    /// Draws `image`, (height, width, channels), to `target`, whose rows are `target_row` bytes apart.
    fn draw_tile(&self, image: &[f32], target: &mut [u8], target_row: usize) {
        let Tile { width, channels, shown_channels, scale, .. } = self.tile;
        let tile_row = width * scale * shown_channels;
        for (row, values) in image.chunks_exact(width * channels).enumerate() {
            let first = row * scale * target_row;
            let pixels = target[first..first + tile_row].chunks_exact_mut(scale * shown_channels);
            for (pixels, value) in pixels.zip(values.chunks_exact(channels)) {
                for pixel in pixels.chunks_exact_mut(shown_channels) {
                    for (byte, &value) in pixel.iter_mut().zip(value) {
                        *byte = to_byte(value);
                    }
                }
            }
            for copy in 1..scale {
                target.copy_within(first..first + tile_row, first + copy * target_row);
            }
        }
    }
}

/// 0 to 1 as 0 to 255, rounded to nearest. A NaN stays one when clamped, and casts to 0.
fn to_byte(value: f32) -> u8 {
    (value.clamp(0.0, 1.0) * 255.0).round() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(axes: &[usize], columns: usize) -> GridSpec {
        GridSpec { shape: Shape::new(axes), columns: NonZeroUsize::new(columns).unwrap() }
    }

    /// A decoded picture, for comparison with what should be in it.
    struct Picture {
        width: usize,
        height: usize,
        channels: usize,
        bytes: Vec<u8>,
    }

    impl Picture {
        fn decode(file: &[u8]) -> Self {
            let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
            let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
            let info = reader.next_frame(&mut bytes).unwrap();
            assert_eq!(info.bit_depth, BitDepth::Eight);
            let (width, height) = (info.width as usize, info.height as usize);
            Self { width, height, channels: info.color_type.samples(), bytes }
        }

        fn draw(spec: &GridSpec, strips: &[&[f32]]) -> Self {
            Self::decode(&grid_png(spec, strips).unwrap())
        }

        fn size(&self) -> (usize, usize, usize) {
            (self.height, self.width, self.channels)
        }

        fn pixel(&self, (row, column): (usize, usize)) -> &[u8] {
            let first = (row * self.width + column) * self.channels;
            &self.bytes[first..first + self.channels]
        }

        /// Whether all pixels of a rectangle, (top, left) and (height, width), are `expected`.
        fn is_all(&self, (top, left): (usize, usize), (height, width): (usize, usize), expected: &[u8]) -> bool {
            let mut pixels = (top..top + height).flat_map(|row| (left..left + width).map(move |column| (row, column)));
            pixels.all(|at| self.pixel(at) == expected)
        }
    }

    #[test]
    fn each_value_becomes_a_square_and_is_clamped() {
        // The longer side has 3 values; 19 pixels for each make 57. The tile starts after the margin of 2.
        let picture = Picture::draw(&spec(&[3, 2], 8), &[&[0.0, 1.0, -3.0, 7.0, 0.5, f32::NAN]]);
        let side = 19;
        assert_eq!(picture.size(), (2 + 3 * side + 2, 2 + 2 * side + 2, 1));
        for (row, values) in [[0, 255], [0, 255], [128, 0]].iter().enumerate() {
            for (column, &value) in values.iter().enumerate() {
                let corner = (2 + row * side, 2 + column * side);
                assert!(picture.is_all(corner, (side, side), &[value]), "value ({row}, {column})");
            }
        }
        assert!(picture.is_all((0, 0), (2, picture.width), &[PAPER]), "top margin");
        assert!(picture.is_all((picture.height - 2, 0), (2, picture.width), &[PAPER]), "bottom margin");
        assert!(picture.is_all((0, 0), (picture.height, 2), &[PAPER]), "left margin");
        assert!(picture.is_all((0, picture.width - 2), (picture.height, 2), &[PAPER]), "right margin");
    }

    /// Scenario: five pairs in two columns, each image of one value that tells its strip and number.
    /// Property: reconstructions are under their originals, bands follow each other, the last one is half empty.
    #[test]
    fn reconstructions_stand_under_their_originals_in_every_band() {
        let value = |strip: usize, image: usize| (10 + 100 * strip + image) as u8;
        let strip = |strip| (0..5).map(|image| f32::from(value(strip, image)) / 255.0).collect::<Vec<_>>();
        let picture = Picture::draw(&spec(&[1, 1, 1], 2), &[&strip(0), &strip(1)]);
        // Margin, three bands of two strips of 56 and a gap of 2, two wider gaps.
        assert_eq!(picture.size(), (2 + 3 * 2 * 58 + 2 * 8, 2 + 2 * 58, 1));
        for (strip, name) in ["originals", "reconstructions"].iter().enumerate() {
            for image in 0..5 {
                let corner = (2 + (image / 2) * (2 * 58 + 8) + strip * 58, 2 + (image % 2) * 58);
                assert!(picture.is_all(corner, (56, 56), &[value(strip, image)]), "image {image} of the {name}");
                assert!(picture.is_all((corner.0 + 56, corner.1), (2, 56), &[PAPER]), "gap under image {image}");
                assert!(picture.is_all((corner.0, corner.1 + 56), (56, 2), &[PAPER]), "gap beside image {image}");
            }
        }
        assert!(picture.is_all((2 + 2 * 58, 0), (8, picture.width), &[PAPER]), "gap between bands");
        assert!(picture.is_all((2 + 2 * 124, 60), (114, 58), &[PAPER]), "no sixth pair");
    }

    #[test]
    fn three_channels_are_colours_and_of_others_the_first_is_shown() {
        let rgb = Picture::draw(&spec(&[1, 2, 3], 8), &[&[1.0, 0.2, 0.0, 0.0, 0.4, 1.0]]);
        assert_eq!(rgb.size(), (2 + 28 + 2, 2 + 56 + 2, 3));
        assert!(rgb.is_all((2, 2), (28, 28), &[255, 51, 0]) && rgb.is_all((2, 30), (28, 28), &[0, 102, 255]));
        assert!(rgb.is_all((0, 0), (2, rgb.width), &[PAPER; 3]));

        let first_of_two = Picture::draw(&spec(&[1, 2, 2], 8), &[&[0.2, 0.9, 0.4, 0.9]]);
        assert_eq!(first_of_two.size(), (2 + 28 + 2, 2 + 56 + 2, 1));
        assert!(first_of_two.is_all((2, 2), (28, 28), &[51]) && first_of_two.is_all((2, 30), (28, 28), &[102]));
    }

    #[test]
    fn images_are_enlarged_by_whole_factors_to_56_pixels_or_more() {
        for (side, pixels) in [(28, 56), (32, 64), (55, 110), (56, 56), (64, 64), (300, 300)] {
            let picture = Picture::draw(&spec(&[side, side], 8), &[&vec![0.0; side * side]]);
            assert_eq!(picture.size(), (pixels + 4, pixels + 4, 1), "side {side}");
        }
        let banner = Picture::draw(&spec(&[2, 300], 8), &[&[0.0; 600]]);
        assert_eq!(banner.size(), (6, 304, 1), "the longer side decides");
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let message = |axes: &[usize], strips: &[&[f32]]| grid_png(&spec(axes, 8), strips).unwrap_err().to_string();
        for axes in [&[784][..], &[], &[1, 2, 2, 1], &[0, 4], &[usize::MAX, 2]] {
            let error = grid_png(&spec(axes, 8), &[&[0.0; 4]]).unwrap_err();
            assert!(matches!(error, GridError::NotAnImage { .. }), "{axes:?}: {error}");
        }
        assert_eq!(
            message(&[784], &[&[0.0; 784]]),
            "samples of shape 784 are not images: (height, width) or (height, width, channels) is needed"
        );
        assert!(matches!(grid_png(&spec(&[2, 2], 8), &[]), Err(GridError::NoImages)));
        assert!(matches!(grid_png(&spec(&[2, 2], 8), &[&[], &[]]), Err(GridError::NoImages)));
        assert_eq!(message(&[2, 2], &[&[0.0; 7]]), "strip 0 has 7 values, but 2 images of shape 2x2 have 8");
        assert_eq!(
            message(&[2, 2], &[&[0.0; 8], &[0.0; 12]]),
            "strip 1 has 12 values, but 2 images of shape 2x2 have 8"
        );
        // 200,000 one-pixel images in a single column: 58 pixels each.
        assert_eq!(
            grid_png(&spec(&[1, 1], 1), &[&vec![0.0; 200_000]]).unwrap_err().to_string(),
            "a picture of 60x13199994 pixels is too large: at most 268435456 bytes are drawn"
        );
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_and_nothing_is_left_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("reconstructions.png");
        fs::write(&path, "an older picture").unwrap();
        write_grid_png(&path, &spec(&[1, 1], 8), &[&[0.0], &[1.0]]).unwrap();
        assert_eq!(Picture::decode(&fs::read(&path).unwrap()).size(), (118, 60, 1));
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);

        let occupied = directory.path().join("occupied");
        fs::create_dir(&occupied).unwrap();
        let error = write_grid_png(&occupied, &spec(&[1, 1], 8), &[&[0.0]]).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot write the images to {}", occupied.display()));
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 2, "the partial file is removed after a failure");
    }
}
