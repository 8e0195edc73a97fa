//! A file that grows by lines, and survives a disk that takes nothing for a while.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A file that only this process appends to. Lines wait in memory until [`LogFile::write`] gets them to the system.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
    written: u64,
    waiting: Vec<u8>,
}

impl LogFile {
    /// A new file.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        Self::open(path, OpenOptions::new().create_new(true))
    }

    /// A new file in the place of one that may be there.
    pub(crate) fn replace(path: &Path) -> io::Result<Self> {
        let log = Self::open(path, OpenOptions::new().create(true))?;
        log.file.set_len(0).map_err(|error| named(path, error))?;
        Ok(log)
    }

    /// The file that is there, cut off after `bytes` bytes, or at the end of its last whole line if it is shorter.
    pub(crate) fn resume(path: &Path, bytes: u64) -> io::Result<Self> {
        let mut log = Self::open(path, OpenOptions::new().create(true))?;
        let cut = |log: &mut Self| {
            let there = log.file.metadata()?.len();
            log.written = if there < bytes { whole_lines(&mut log.file)? } else { bytes };
            log.file.set_len(log.written)?;
            log.file.seek(SeekFrom::Start(log.written))?;
            log.file.sync_all()
        };
        cut(&mut log).map_err(|error| named(path, error))?;
        Ok(log)
    }

    fn open(path: &Path, options: &mut OpenOptions) -> io::Result<Self> {
        let file = options.read(true).write(true).open(path).map_err(|error| named(path, error))?;
        lock(path, &file)?;
        Ok(Self { path: path.to_owned(), file, written: 0, waiting: Vec::new() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A new file on a disk that takes nothing, and what it must be put on to be on another one.
    #[cfg(all(test, target_os = "linux"))]
    pub(crate) fn on_full_disk(path: &Path) -> (Self, File) {
        let mut log = Self::create(path).unwrap();
        let disk = std::mem::replace(&mut log.file, OpenOptions::new().write(true).open("/dev/full").unwrap());
        (log, disk)
    }

    /// The disk has room again.
    #[cfg(all(test, target_os = "linux"))]
    pub(crate) fn back_on(&mut self, disk: File) {
        self.file = disk;
    }

    /// Adds a line to those that wait. The line break is added.
    pub(crate) fn append(&mut self, line: &str) {
        self.waiting.extend_from_slice(line.as_bytes());
        self.waiting.push(b'\n');
    }

    /// Bytes that are not written yet.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes that are.
    pub(crate) fn written_bytes(&self) -> u64 {
        self.written
    }

    /// Hands what waits to the system. What it does not take keeps waiting.
    pub(crate) fn write(&mut self) -> io::Result<()> {
        let mut taken = 0;
        let mut outcome = Ok(());
        while taken < self.waiting.len() && outcome.is_ok() {
            match self.file.write(&self.waiting[taken..]) {
                Ok(0) => outcome = Err(ErrorKind::WriteZero.into()),
                Ok(bytes) => taken += bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => outcome = Err(error),
            }
        }
        self.written += taken as u64;
        self.waiting.drain(..taken);
        outcome
    }

    /// Waits until everything written is on the disk.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// If the file was removed, puts a copy of it into its place, with its directory.
    pub(crate) fn restore(&mut self) -> io::Result<()> {
        if !is_gone(&self.path, &self.file)? {
            return Ok(());
        }
        if let Some(directory) = self.path.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut copy = OpenOptions::new().read(true).write(true).create_new(true).open(&self.path)?;
        let copied = self.file.seek(SeekFrom::Start(0)).and_then(|_| {
            lock(&self.path, &copy)?;
            io::copy(&mut (&self.file).take(self.written), &mut copy)?;
            copy.sync_all()
        });
        match copied {
            Ok(()) => self.file = copy,
            // The file without a name stays the one that is written; it is tried again.
            Err(error) => {
                self.file.seek(SeekFrom::Start(self.written))?;
                let _ = fs::remove_file(&self.path);
                return Err(error);
            }
        }
        Ok(())
    }
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Two processes that append to one file would spoil it.
fn lock(path: &Path, file: &File) -> io::Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => {
            let reason = format!("{} is being written by another process: the run is still going on", path.display());
            Err(io::Error::new(ErrorKind::ResourceBusy, reason))
        }
        // A file system without locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

/// Length of the file up to its last line break.
fn whole_lines(file: &mut File) -> io::Result<u64> {
    file.seek(SeekFrom::Start(0))?;
    let (mut length, mut whole) = (0, 0);
    let mut piece = vec![0; 1 << 16];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(whole),
            bytes => {
                if let Some(at) = piece[..bytes].iter().rposition(|&byte| byte == b'\n') {
                    whole = length + at as u64 + 1;
                }
                length += bytes as u64;
            }
        }
    }
}

/// Whether the file at `path` is not `file` any more, because it was removed.
fn is_gone(path: &Path, file: &File) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(there) => same_file(&there, &file.metadata()?).map_or(Ok(false), |same| {
            if same { Ok(false) } else { Err(io::Error::other("another file was put into its place")) }
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

#[cfg(unix)]
fn same_file(left: &fs::Metadata, right: &fs::Metadata) -> Option<bool> {
    use std::os::unix::fs::MetadataExt;
    Some((left.dev(), left.ino()) == (right.dev(), right.ino()))
}

#[cfg(not(unix))]
fn same_file(_: &fs::Metadata, _: &fs::Metadata) -> Option<bool> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(log: &mut LogFile, lines: &[&str]) {
        lines.iter().for_each(|line| log.append(line));
        log.write().unwrap();
    }

    #[test]
    fn what_comes_after_a_position_is_cut_off_and_the_rest_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = LogFile::create(&path).unwrap();
        written(&mut log, &["one", "two"]);
        let position = log.written_bytes();
        written(&mut log, &["three"]);
        log.file.write_all(b"tor").unwrap();
        drop(log);
        let mut log = LogFile::resume(&path, position).unwrap();
        written(&mut log, &["4"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n4\n");
    }

    #[test]
    fn a_file_that_is_shorter_than_the_position_keeps_its_whole_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, "one\ntwo\ntor").unwrap();
        drop(LogFile::resume(&path, 1000).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        assert_eq!(LogFile::resume(&directory.path().join("new"), 1000).unwrap().written_bytes(), 0);
    }

    #[test]
    fn two_writers_are_one_too_many() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let log = LogFile::create(&path).unwrap();
        let refused = LogFile::resume(&path, 0).unwrap_err().to_string();
        assert!(refused.contains("the run is still going on"), "{refused}");
        drop(log);
        LogFile::resume(&path, 0).unwrap();
    }

    #[test]
    fn a_removed_file_comes_back_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run").join("log");
        fs::create_dir(path.parent().unwrap()).unwrap();
        let mut log = LogFile::create(&path).unwrap();
        written(&mut log, &["one"]);
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
        log.append("two");
        log.restore().unwrap();
        log.write().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    }

    /// `/dev/full` takes nothing, as a full disk does.
    #[test]
    #[cfg(target_os = "linux")]
    fn what_a_full_disk_does_not_take_waits() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = LogFile::create(&path).unwrap();
        written(&mut log, &["one"]);
        let disk = std::mem::replace(&mut log.file, OpenOptions::new().write(true).open("/dev/full").unwrap());
        log.append("two");
        assert_eq!(log.write().unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!((log.written_bytes(), log.waiting_bytes()), (4, 4));
        log.file = disk;
        written(&mut log, &["three"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\nthree\n");
    }
}
