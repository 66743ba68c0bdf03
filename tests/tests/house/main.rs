//! The house itself: the demonstration, the documents, the harness and its guest are what they say.

mod demo;
mod documents;
mod guest_boots;
mod harness;
mod point_in_time;
