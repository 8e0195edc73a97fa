//! Secrets that open a coordinator's services, and how they travel: in gRPC metadata, `authorization: Bearer ...`.

use std::fmt;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq};
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};

use crate::limits::{MAX_TOKEN_BYTES, MAX_TOKEN_FILE_BYTES, MAX_TOKENS_PER_FILE, MIN_TOKEN_BYTES};
use crate::secret_file::{FileError, read};

/// The metadata key, and the word before the token.
const AUTHORIZATION: &str = "authorization";
const SCHEME: &str = "Bearer ";

/// Random bytes of a token that is made here: as many as a key of AES-256 has.
const RANDOM_BYTES: usize = 32;

/// A secret. It is never shown: its `Debug` form hides it, and it has no `Display`.
#[derive(Clone)]
pub struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[hidden]")
    }
}

/// Why a text is no token. The text itself is not shown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It could be guessed.
    #[error(
        "a token must have at least {MIN_TOKEN_BYTES} characters, this one has {0}; `lockstep certs` makes good ones, and so does `openssl rand -hex 32`"
    )]
    TooShort(usize),
    /// It does not fit into the header of a request.
    #[error("a token may have at most {MAX_TOKEN_BYTES} characters, this one has {0}")]
    TooLong(usize),
    /// It cannot stand in the header of a request.
    #[error("a token consists of visible ASCII characters without spaces; character {0} of this one is none")]
    Character(usize),
}

impl Token {
    /// A token from the text of a file or an environment variable, without the white space around it.
    ///
    /// # Errors
    /// [`TokenError`] when it is too short, too long, or has other characters than visible ASCII.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if let Some(position) = text.chars().position(|character| !character.is_ascii_graphic()) {
            return Err(TokenError::Character(position + 1));
        }
        match text.len() {
            length if length < MIN_TOKEN_BYTES => Err(TokenError::TooShort(length)),
            length if length > MAX_TOKEN_BYTES => Err(TokenError::TooLong(length)),
            _ => Ok(Self(text.to_owned())),
        }
    }

    /// A token of 256 random bits, as hexadecimal digits.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; RANDOM_BYTES];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// The secret itself: to be written to a file or handed to a child process, never to be shown.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The value of the `authorization` header; marked as sensitive, so that it is not indexed by header compression
    /// and not shown in logs.
    pub fn bearer(&self) -> MetadataValue<Ascii> {
        // Visible ASCII is what a header may have.
        let mut value = MetadataValue::try_from(format!("{SCHEME}{}", self.0))
            .unwrap_or_else(|_| MetadataValue::from_static("Bearer"));
        value.set_sensitive(true);
        value
    }

    /// Puts the token into a request's metadata.
    pub fn attach(&self, metadata: &mut MetadataMap) {
        metadata.insert(AUTHORIZATION, self.bearer());
    }
}

/// Tokens of which any one opens a service: usually one, two while it is being replaced.
#[derive(Clone, Debug)]
pub struct Tokens(Vec<[u8; 32]>);

impl Tokens {
    /// Reads one token a line. Empty lines do not count.
    ///
    /// # Errors
    /// [`TokenFileError`] when the file cannot be read, has none, too many, or a line is no token.
    pub fn read(path: &Path) -> Result<Self, TokenFileError> {
        Ok(Self::of(&read_tokens(path)?))
    }

    /// These and no others.
    pub fn of(tokens: &[Token]) -> Self {
        Self(tokens.iter().map(|token| hash(token.reveal().as_bytes())).collect())
    }

    /// Whether the presented secret is one of them. Takes the same time whatever it is: hashes of equal length are
    /// compared, all of them, each to its end.
    pub fn accept(&self, presented: &Presented) -> bool {
        let found = self.0.iter().fold(Choice::from(0), |found, token| found | token.ct_eq(&presented.0));
        found.into()
    }

    /// Whether both have a token in common.
    pub fn overlap(&self, other: &Self) -> bool {
        other.0.iter().any(|token| self.accept(&Presented(*token)))
    }
}

/// What a request carries, hashed.
pub struct Presented([u8; 32]);

impl Presented {
    /// The secret in a request's `authorization` header, of whatever quality; `None` without a bearer token.
    pub fn in_headers(headers: &tonic::codegen::http::HeaderMap) -> Option<Self> {
        let value = headers.get(AUTHORIZATION)?.as_bytes();
        let (scheme, secret) = value.split_at_checked(SCHEME.len())?;
        scheme.eq_ignore_ascii_case(SCHEME.as_bytes()).then(|| Self(hash(secret)))
    }
}

fn hash(secret: &[u8]) -> [u8; 32] {
    Sha256::digest(secret).into()
}

/// Why a file has no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A line of it is none.
    #[error("{path}, line {line}: {error}", path = path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        error: TokenError,
    },
    /// It has none, or too many.
    #[error("{path} has {count} tokens, one a line; from 1 to {MAX_TOKENS_PER_FILE} can be there", path = path.display())]
    Count {
        /// The file.
        path: PathBuf,
        /// How many.
        count: usize,
    },
}

/// The tokens of a file, one a line: a client sends the first one.
///
/// # Errors
/// [`TokenFileError`] when the file cannot be read, has none, too many, or a line is no token.
pub fn read_tokens(path: &Path) -> Result<Vec<Token>, TokenFileError> {
    let bytes = read(path, MAX_TOKEN_FILE_BYTES)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let token = |(number, line): (usize, &str)| {
        let wrong = |error| TokenFileError::Token { path: path.to_owned(), line: number + 1, error };
        Token::parse(line).map_err(wrong)
    };
    let tokens: Vec<Token> = lines.map(token).collect::<Result<_, _>>()?;
    match tokens.len() {
        1..=MAX_TOKENS_PER_FILE => Ok(tokens),
        count => Err(TokenFileError::Count { path: path.to_owned(), count }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "correct-horse-battery";

    fn presented(header: &str) -> Option<Presented> {
        let mut headers = tonic::codegen::http::HeaderMap::new();
        headers.insert(AUTHORIZATION, header.parse().unwrap());
        Presented::in_headers(&headers)
    }

    #[test]
    fn a_token_is_not_shown() {
        let token = Token::parse(SECRET).unwrap();
        assert_eq!(format!("{token:?}"), "[hidden]");
        assert!(!format!("{:?}", Tokens::of(std::slice::from_ref(&token))).contains(SECRET));
        let mut metadata = MetadataMap::new();
        token.attach(&mut metadata);
        assert!(!format!("{metadata:?}").contains(SECRET));
    }

    #[test]
    fn what_could_be_guessed_or_sent_wrong_is_no_token() {
        assert_eq!(Token::parse("fifteen-letters").unwrap_err(), TokenError::TooShort(15));
        assert_eq!(
            Token::parse(&"x".repeat(MAX_TOKEN_BYTES + 1)).unwrap_err(),
            TokenError::TooLong(MAX_TOKEN_BYTES + 1)
        );
        assert_eq!(Token::parse("correct horse battery").unwrap_err(), TokenError::Character(8));
        assert_eq!(Token::parse("correct-horse-b\u{e4}ttery").unwrap_err(), TokenError::Character(16));
        assert_eq!(Token::parse(&format!("  {SECRET}\r\n")).unwrap().reveal(), SECRET);
    }

    #[test]
    fn only_the_right_token_is_accepted() {
        let (first, second) = (Token::parse(SECRET).unwrap(), Token::random().unwrap());
        assert_eq!(second.reveal().len(), 64);
        let tokens = Tokens::of(&[first, second.clone()]);
        let accepted = |header: &str| presented(header).is_some_and(|presented| tokens.accept(&presented));
        assert!(accepted(&format!("Bearer {SECRET}")));
        assert!(accepted(&format!("bearer {}", second.reveal())));
        let almost = [&SECRET[1..], &SECRET[..20], "", &format!("{SECRET} "), &format!(" {SECRET}")];
        assert!(almost.iter().all(|secret| !accepted(&format!("Bearer {secret}"))));
        assert!(!accepted(SECRET));
        assert!(!accepted(&format!("Basic {SECRET}")));
        assert!(tokens.overlap(&Tokens::of(&[second])));
        assert!(!tokens.overlap(&Tokens::of(&[Token::random().unwrap()])));
    }

    #[test]
    fn a_file_has_one_token_a_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let with = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_tokens(&path).map(|tokens| tokens.len()).map_err(|error| error.to_string())
        };
        assert_eq!(with(&format!("{SECRET}\n")), Ok(1));
        assert_eq!(with(&format!("\r\n{SECRET}\r\n\r\n{SECRET}-2\r\n")), Ok(2));
        assert!(with("\n\n").unwrap_err().contains("has 0 tokens"));
        assert!(with(&format!("{SECRET}\n").repeat(9)).unwrap_err().contains("has 9 tokens"));
        let short = with(&format!("{SECRET}\nshort-one\n")).unwrap_err();
        assert!(short.contains("line 2") && !short.contains("short-one"), "{short}");
        assert!(with(&"x".repeat(MAX_TOKEN_FILE_BYTES + 1)).unwrap_err().contains("larger than"));
    }
}
