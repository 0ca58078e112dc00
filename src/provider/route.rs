//! Which providers answer for a model.

/// Whose models are these, and whom else to ask.
#[derive(Debug, Default)]
pub(super) struct Routes {
    entries: Vec<Entry>,
    /// Index of the provider for everything else.
    pub default: Option<usize>,
}

#[derive(Debug)]
struct Entry {
    name: String,
    models: Vec<String>,
    fail_over: Vec<String>,
}

impl Routes {
    /// Adds the next provider.
    pub fn push(&mut self, name: &str, models: Vec<String>, fail_over: Vec<String>) {
        self.entries.push(Entry { name: name.into(), models, fail_over });
    }

    /// The index of a provider by name.
    pub fn named(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.name == name)
    }

    /// All models and patterns, in order.
    pub fn known(&self) -> Vec<String> {
        let mut known = Vec::new();
        for model in self.entries.iter().flat_map(|entry| &entry.models) {
            if !known.contains(model) {
                known.push(model.clone());
            }
        }
        known
    }

    /// Providers to ask for `model`, in this order. Those that name it; if there are none, those whose pattern fits with
    /// the most characters; if there are none, the default. Then those to which the former fail over.
    pub fn find(&self, model: &str) -> Vec<usize> {
        let mut found = self.best(model);
        let mut at = 0;
        while let Some(index) = found.get(at) {
            for name in &self.entries[*index].fail_over {
                if let Some(next) = self.named(name).filter(|next| !found.contains(next)) {
                    found.push(next);
                }
            }
            at += 1;
        }
        found
    }

    fn best(&self, model: &str) -> Vec<usize> {
        let mut best = 0;
        let mut found = Vec::new();
        for (index, entry) in self.entries.iter().enumerate() {
            let fit = entry.models.iter().filter_map(|pattern| fit(pattern, model)).max().unwrap_or(0);
            if fit > best {
                best = fit;
                found.clear();
            }
            if fit > 0 && fit == best {
                found.push(index);
            }
        }
        if found.is_empty() { self.default.into_iter().collect() } else { found }
    }
}

/// How well a pattern fits: one more than its characters beside `*`; a name without `*` fits best.
fn fit(pattern: &str, model: &str) -> Option<usize> {
    if !pattern.contains('*') {
        return (pattern == model).then_some(usize::MAX);
    }
    matches(pattern, model).then(|| 1 + pattern.bytes().filter(|byte| *byte != b'*').count())
}

/// `*` stands for any characters, or none. Takes the shortest match of each part between two, which finds one if there is.
fn matches(pattern: &str, model: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = model.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn routes() -> Routes {
        let own = |models: &[&str]| models.iter().map(|m| (*m).to_owned()).collect::<Vec<_>>();
        let mut routes = Routes::default();
        routes.push("a", own(&["gpt-4o"]), own(&["d", "b"]));
        routes.push("b", own(&["gpt-*"]), vec![]);
        routes.push("c", own(&["gpt-4*", "*-mini"]), own(&["a"]));
        routes.push("d", own(&["local"]), vec![]);
        routes.push("e", own(&["gpt-4o"]), vec![]);
        routes
    }

    /// Goal:   exact before patterns, longer patterns before shorter ones, then the default, then fail-over in order.
    #[test]
    fn r2_7_models_are_routed() {
        let mut routes = routes();
        assert_eq!(routes.find("gpt-4o"), [0, 4, 3, 1]);
        assert_eq!(routes.find("gpt-3"), [1]);
        assert_eq!(routes.find("gpt-4"), [2, 0, 3, 1]);
        assert_eq!(routes.find("local"), [3]);
        assert_eq!(routes.find("other"), [0usize; 0]);
        routes.default = Some(3);
        assert_eq!(routes.find("other"), [3]);
        assert_eq!(routes.find(""), [3]);
        assert_eq!(routes.known(), ["gpt-4o", "gpt-*", "gpt-4*", "*-mini", "local"]);
    }

    /// The oracle: every way to split.
    fn plainly(pattern: &[u8], model: &[u8]) -> bool {
        match (pattern.split_first(), model.split_first()) {
            (None, None) => true,
            (Some((b'*', rest)), _) => (0..=model.len()).any(|at| plainly(rest, &model[at..])),
            (Some((p, pattern)), Some((m, model))) => p == m && plainly(pattern, model),
            _ => false,
        }
    }

    proptest! {
        /// Goal:   patterns fit as they plainly do.
        #[test]
        fn r2_7_patterns_fit_as_they_plainly_do(pattern in "[ab*]{0,6}", model in "[ab]{0,8}") {
            let fits = fit(&pattern, &model).is_some();
            prop_assert_eq!(fits, plainly(pattern.as_bytes(), model.as_bytes()));
        }
    }
}
