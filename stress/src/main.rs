//! The stress levels.

fn main() {}
