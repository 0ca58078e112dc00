//! Codecs
fn main() {}
