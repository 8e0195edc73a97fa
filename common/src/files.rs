//! Files that are either whole or not there.

mod direct;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use direct::DirectWriter;

/// Extension of unfinished files.
const PARTIAL: &str = "partial";

/// Replaces the file at `path` by what `write` writes: beside it first, synced, then renamed. When anything fails, what
/// was at `path` stays, and nothing half-written is left.
///
/// # Errors
/// Those of creating, writing, syncing and renaming.
pub fn replace(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    replace_by(path, |beside| {
        let mut file = io::BufWriter::new(File::create(beside)?);
        write(&mut file)?;
        file.into_inner().map_err(io::IntoInnerError::into_error)
    })
}

/// [`replace`] for files of many megabytes that are hardly ever read: they cost the processor less than half.
///
/// # Errors
/// As for [`replace`].
pub fn replace_large(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    replace_by(path, |beside| {
        let mut file = DirectWriter::create(beside)?;
        write(&mut file)?;
        file.finish()
    })
}

fn replace_by(path: &Path, write: impl FnOnce(&Path) -> io::Result<File>) -> io::Result<()> {
    let beside = beside(path);
    let written = (|| {
        write(&beside)?.sync_all()?;
        fs::rename(&beside, path)?;
        sync_parent(path)
    })();
    if written.is_err() {
        // The first error is the one to report; the leftover may not exist at all.
        let _ = fs::remove_file(&beside);
    }
    written
}

/// Removes from a directory, if there is one, what [`replace`] had not finished when its process was killed.
///
/// # Errors
/// Those of reading the directory and of removing.
pub fn remove_partial(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let path = entry?.path();
        if is_partial(&path) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Whether a path is that of a file that [`replace`] has not finished.
pub fn is_partial(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == PARTIAL)
}

/// Makes a rename durable, where directories can be synced.
fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if cfg!(unix) { File::open(parent)?.sync_all() } else { Ok(()) }
}

/// The place for the unfinished file: the same directory, so that renaming does not cross file systems.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.{PARTIAL}", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        replace(&path, |file| file.write_all(b"old")).unwrap();
        let half = |file: &mut dyn Write| {
            file.write_all(b"half")?;
            Err(io::Error::other("disk full"))
        };
        for error in [replace(&path, half), replace_large(&path, half)] {
            assert_eq!(error.unwrap_err().to_string(), "disk full");
            assert_eq!(fs::read(&path).unwrap(), b"old");
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        }
        replace_large(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn what_a_killed_process_left_unfinished_is_removed_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        replace(&path, |file| file.write_all(b"whole")).unwrap();
        fs::write(beside(&path), b"hal").unwrap();
        remove_partial(directory.path()).unwrap();
        assert!(path.exists() && !beside(&path).exists());
        remove_partial(&directory.path().join("absent")).unwrap();
    }
}
