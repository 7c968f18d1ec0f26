//! Whom the relay believes: client certificates, judged as the apiserver judges them.

mod aws_lc;

pub use aws_lc::AwsLc;
