//! The processor's atomics with a hook before every load: under `cfg(fuzzing)` only.
//!
//! A hostile peer may change shared memory between any two loads of ours. The hook lets a fuzzer do just
//! that on one thread, so that every finding replays from its input alone.

use std::cell::RefCell;
pub(crate) use std::sync::atomic::{Ordering, fence};

type Hook = Box<dyn FnMut()>;

thread_local! {
    static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

/// Calls `hook` before every load (and every exchange) of shared memory on this thread, until the next call.
/// Loads that the hook makes itself call nothing.
pub fn set_hook(hook: Option<Hook>) {
    HOOK.with(|h| *h.borrow_mut() = hook);
}

fn before_load() {
    HOOK.with(|h| {
        if let Ok(mut hook) = h.try_borrow_mut()
            && let Some(hook) = hook.as_mut()
        {
            hook();
        }
    });
}

macro_rules! hooked {
    ($name:ident, $value:ty) => {
        #[doc = concat!("An atomic ", stringify!($value), " whose loads call the hook.")]
        #[repr(transparent)]
        #[derive(Debug)]
        pub struct $name(std::sync::atomic::$name);

        /// For those who hand the word to the kernel.
        impl std::ops::Deref for $name {
            type Target = std::sync::atomic::$name;

            fn deref(&self) -> &Self::Target {
                &self.0
            }
        }

        impl $name {
            /// A new atomic.
            pub const fn new(value: $value) -> Self {
                Self(std::sync::atomic::$name::new(value))
            }

            /// As of the standard library.
            pub fn load(&self, order: Ordering) -> $value {
                before_load();
                self.0.load(order)
            }

            /// As of the standard library.
            pub fn store(&self, value: $value, order: Ordering) {
                self.0.store(value, order);
            }

            /// As of the standard library.
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                before_load();
                self.0.swap(value, order)
            }

            /// As of the standard library.
            pub fn fetch_or(&self, value: $value, order: Ordering) -> $value {
                before_load();
                self.0.fetch_or(value, order)
            }

            /// As of the standard library.
            pub fn fetch_and(&self, value: $value, order: Ordering) -> $value {
                before_load();
                self.0.fetch_and(value, order)
            }
        }
    };
}

hooked!(AtomicU32, u32);
hooked!(AtomicU64, u64);
