//! The text that `xt train` learns from by default.

/// Hamlet, Macbeth, Romeo and Juliet, King Lear, A Midsummer Night's Dream, The Tempest, The Merchant of Venice and
/// Twelfth Night, in the public domain: the texts of Project Gutenberg (1998) without its headers and without blanks at
/// the ends of lines.
pub static PLAYS: &[u8] = include_bytes!("../corpus.txt");
