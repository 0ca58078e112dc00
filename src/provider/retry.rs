//! How long to wait before a provider is asked again.

use super::{ProviderError, RetryConfig};
use std::time::Duration;

/// The pauses of one request with one provider.
#[derive(Debug)]
pub(super) struct Backoff<'a> {
    config: &'a RetryConfig,
    asked_again: u32,
}

impl<'a> Backoff<'a> {
    pub fn new(config: &'a RetryConfig) -> Self {
        Self { config, asked_again: 0 }
    }

    /// How long to wait after `error`, or `None` if it is no use to ask again. `random` is evenly distributed.
    pub fn pause(&mut self, error: &ProviderError, random: u64) -> Option<Duration> {
        if !error.is_transient() || self.asked_again >= self.config.retries {
            return None;
        }
        let most = Duration::from_millis(self.config.max_pause_ms);
        let wanted = error.retry_after().unwrap_or_default();
        if wanted > most {
            return None;
        }
        let doubled = self.config.first_pause_ms.saturating_mul(1 << self.asked_again.min(20));
        let bound = Duration::from_millis(doubled).min(most);
        self.asked_again += 1;
        // Between half of it and all of it: many who failed at once do not come back at once.
        let share = 0.5 + (random >> 11) as f64 / (1u64 << 54) as f64;
        Some(bound.mul_f64(share).max(wanted))
    }
}

/// A random number, for jitter.
pub(super) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(retry_after: Option<Duration>) -> ProviderError {
        ProviderError::RateLimited { provider: "p".into(), retry_after, code: None }
    }

    /// Goal:   pauses double, stay between half and all of their bound, and come to an end.
    #[test]
    fn r2_7_pauses_double_with_jitter_and_end() {
        let config = RetryConfig { retries: 4, first_pause_ms: 100, max_pause_ms: 350 };
        for random in [0, 1, u64::MAX / 2, u64::MAX] {
            let mut backoff = Backoff::new(&config);
            for bound in [100, 200, 350, 350] {
                let pause = backoff.pause(&limited(None), random).unwrap().as_secs_f64() * 1e3;
                assert!((f64::from(bound) / 2.0..=f64::from(bound)).contains(&pause), "{pause} of {bound}");
            }
            assert_eq!(backoff.pause(&limited(None), random), None);
        }
    }

    /// Goal:   Retry-After is the least pause, and one that is too long is not waited for.
    #[test]
    fn r2_7_retry_after_is_honoured() {
        let config = RetryConfig { retries: 4, first_pause_ms: 100, max_pause_ms: 3000 };
        let mut backoff = Backoff::new(&config);
        let two = Duration::from_secs(2);
        assert_eq!(backoff.pause(&limited(Some(two)), 7), Some(two));
        assert_eq!(backoff.pause(&limited(Some(two * 2)), 7), None);
        let hopeless = ProviderError::Unauthorized { provider: "p".into(), status: 401 };
        assert_eq!(backoff.pause(&hopeless, 7), None);
    }
}
