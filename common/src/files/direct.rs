//! Large files that are written once and hardly ever read again, past the kernel's cache.
//!
//! Through the cache every byte is copied once more by the processor, into memory that has to be found and emptied
//! first. Past it (`O_DIRECT`), the device fetches whole blocks where they lie. Where a file system cannot do that, the
//! file is written through the cache after all.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

/// What devices want addresses, places in a file and lengths to be multiples of, in bytes.
const BLOCK: usize = 4096;
/// Bytes written at a time: enough for a device, and still in the core's own cache when they are fetched.
const BUFFER: usize = 1 << 20;

/// Writes a new file past the cache. It is whole after [`DirectWriter::finish`] only.
#[derive(Debug)]
pub(super) struct DirectWriter {
    file: File,
    /// Whether the cache is still passed by.
    direct: bool,
    memory: Vec<u8>,
    /// Where the buffer begins in `memory`, so that it is aligned.
    start: usize,
    /// Bytes in the buffer.
    filled: usize,
    /// Bytes of the file.
    length: u64,
}

impl DirectWriter {
    /// Creates the file at `path`, or empties the one that is there.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let (file, direct) = create(path)?;
        let memory = vec![0; BUFFER + BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        Ok(Self { file, direct, memory, start, filled: 0, length: 0 })
    }

    /// Writes what is left and cuts the file to its length.
    pub(super) fn finish(mut self) -> io::Result<File> {
        let padded = self.filled.next_multiple_of(BLOCK);
        self.memory[self.start..][self.filled..padded].fill(0);
        self.filled = padded;
        self.write_buffer()?;
        self.file.set_len(self.length)?;
        Ok(self.file)
    }

    fn write_buffer(&mut self) -> io::Result<()> {
        let mut rest = &self.memory[self.start..][..self.filled];
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Another block size, or a rest after a part was written.
                Err(error) if error.kind() == ErrorKind::InvalidInput && self.direct => {
                    through_cache(&self.file)?;
                    self.direct = false;
                }
                Err(error) => return Err(error),
            }
        }
        self.filled = 0;
        Ok(())
    }
}

impl Write for DirectWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.filled == BUFFER {
            self.write_buffer()?;
        }
        let taken = bytes.len().min(BUFFER - self.filled);
        self.memory[self.start..][self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
        self.filled += taken;
        self.length += taken as u64;
        Ok(taken)
    }

    /// Nothing: only whole blocks can be written before [`DirectWriter::finish`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The file, and whether it passes the cache by.
#[cfg(target_os = "linux")]
fn create(path: &Path) -> io::Result<(File, bool)> {
    use std::os::unix::fs::OpenOptionsExt;

    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    let direct = options.clone().custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed()).open(path);
    match direct {
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok((options.open(path)?, false)),
        direct => Ok((direct?, true)),
    }
}

#[cfg(not(target_os = "linux"))]
fn create(path: &Path) -> io::Result<(File, bool)> {
    Ok((OpenOptions::new().write(true).create(true).truncate(true).open(path)?, false))
}

#[cfg(target_os = "linux")]
fn through_cache(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags - rustix::fs::OFlags::DIRECT)?)
}

#[cfg(not(target_os = "linux"))]
fn through_cache(_: &File) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that tell where they belong.
    fn content(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i ^ i >> 8 ^ i >> 16) as u8).collect()
    }

    fn written(length: usize, piece: usize, before: impl FnOnce(&mut DirectWriter)) -> Vec<u8> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "older content").unwrap();
        let mut writer = DirectWriter::create(&path).unwrap();
        before(&mut writer);
        content(length).chunks(piece).for_each(|piece| writer.write_all(piece).unwrap());
        writer.finish().unwrap();
        std::fs::read(&path).unwrap()
    }

    #[test]
    fn files_of_any_length_come_out_whole() {
        for length in [0, 1, BLOCK - 1, BLOCK, BUFFER - 1, BUFFER, BUFFER + 1, 3 * BUFFER + BLOCK + 5] {
            for piece in [777, BUFFER, 4 * BUFFER] {
                assert!(written(length, piece, |_| {}) == content(length), "{length} bytes in pieces of {piece}");
            }
        }
    }

    /// As on a device with larger blocks: what is refused goes through the cache.
    #[test]
    fn a_refused_write_goes_through_the_cache() {
        // An odd address is refused by every device; where nothing is direct, nothing is refused.
        let length = 2 * BUFFER + 5;
        assert!(written(length, 999, |writer| writer.start -= usize::from(writer.start > 0)) == content(length));
    }
}
