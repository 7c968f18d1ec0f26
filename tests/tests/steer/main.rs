//! GOAWAY from a uprobe: on a server with the apiserver's own filter, in a machine whose kernel lets a probe set
//! registers, and everything else about it on any machine.

mod here;
mod machine;
mod probe;
mod real;
mod refusals;
mod together;
mod world;
