//! What can go wrong, in words a user can act on.

use std::fmt::Display;
use std::io;
use std::path::PathBuf;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure that names where it happened, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused an operation on a file.
    #[error("{}: cannot {operation}: {source}", .path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// The verb, in the infinitive: "open", "read".
        operation: &'static str,
        /// The system's own error.
        source: io::Error,
    },
    /// A file breaks the safetensors format or contradicts itself.
    #[error("{}: {}expected {expected}, found {found}", .path.display(), tensor.as_ref().map_or_else(String::new, |name| format!("tensor '{name}': ")))]
    Damaged {
        /// The file that is damaged.
        path: PathBuf,
        /// The tensor, where one is concerned.
        tensor: Option<String>,
        /// What the format or the index demands.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// The folder holds no checkpoint that can be read without running code.
    #[error("{}: {message}", .path.display())]
    Unreadable {
        /// The folder.
        path: PathBuf,
        /// What is there instead, and what to do.
        message: String,
    },
    /// The caller asked for something that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// A thread of this crate could not be started, or panicked.
    #[error("{0}")]
    Thread(String),
}

impl Error {
    /// An [`Error::Io`] for `path`; use with `map_err`.
    pub fn io(path: impl Into<PathBuf>, operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, operation, source }
    }

    /// An [`Error::Damaged`]. What a file says may be long or hostile: every text is cut to a
    /// readable length and its control characters are escaped.
    pub fn damaged(
        path: impl Into<PathBuf>,
        tensor: Option<&str>,
        expected: impl Display,
        found: impl Display,
    ) -> Self {
        Self::Damaged {
            path: path.into(),
            tensor: tensor.map(readable),
            expected: readable(&expected.to_string()),
            found: readable(&found.to_string()),
        }
    }
}

/// The first 200 characters of `text`, control characters escaped.
pub(crate) fn readable(text: &str) -> String {
    const LIMIT: usize = 200;
    let mut shown = String::new();
    for (index, character) in text.chars().enumerate() {
        if index == LIMIT {
            shown.push('…');
            break;
        }
        if character.is_control() {
            shown.extend(character.escape_unicode());
        } else {
            shown.push(character);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_a_file_are_clipped_and_cannot_steer_a_terminal() {
        let error = Error::damaged("f", Some("a\u{1b}[2J"), "b", "ü".repeat(1000));
        let found = "ü".repeat(200);
        assert_eq!(
            error.to_string(),
            format!("f: tensor 'a\\u{{1b}}[2J': expected b, found {found}…")
        );
    }
}
