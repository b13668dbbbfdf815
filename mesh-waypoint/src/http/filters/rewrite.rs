//! `URLRewrite`: another authority or path towards the application. Pure.

use http::uri::{Authority, PathAndQuery};
use mesh_core::{
    model::{PathMatch, Rewrite},
    rewrite,
};

/// Authority and target after `change`; `None` where they would not be ones.
pub fn apply(
    change: &Rewrite,
    matched: &PathMatch,
    authority: &Authority,
    target: &PathAndQuery,
) -> Option<(Authority, PathAndQuery)> {
    let Rewrite { hostname, path } = change;
    let authority = match hostname {
        Some(hostname) => Authority::try_from(&**hostname).ok()?,
        None => authority.clone(),
    };
    let target = match path {
        Some(edit) => {
            PathAndQuery::try_from(rewrite::target(edit, matched, target.path(), target.query())).ok()?
        }
        None => target.clone(),
    };
    Some((authority, target))
}

#[cfg(test)]
mod tests {
    use mesh_core::model::PathEdit;

    use super::*;

    #[test]
    fn host_and_path_change_and_the_query_stays() {
        let (authority, target) = (Authority::from_static("a:80"), PathAndQuery::from_static("/x/y?q=1"));
        let matched = PathMatch::Prefix("/x".into());
        let change = Rewrite { hostname: Some("b.test".into()), path: Some(PathEdit::Prefix("/z".into())) };
        let (host, to) = apply(&change, &matched, &authority, &target).unwrap();
        assert_eq!((host.as_str(), to.as_str()), ("b.test", "/z/y?q=1"));
        let (host, to) = apply(&Rewrite::default(), &matched, &authority, &target).unwrap();
        assert_eq!((host.as_str(), to.as_str()), ("a:80", "/x/y?q=1"));
        let broken = Rewrite { hostname: None, path: Some(PathEdit::Full("/a b".into())) };
        assert!(apply(&broken, &matched, &authority, &target).is_none());
    }
}
