//! The two pages. Their markers (title, `glyphicon glyphicon-star`, `gap-x-1 text-COLOR-500`, the error sentences) are
//! what the tasks' checks look for.

use http::StatusCode;
use serde_json::{Value, json};

/// The one book there is.
pub fn book() -> Value {
    json!({
        "id": 0,
        "title": "The Comedy of Errors",
        "descriptionHtml":
            "<a href=\"https://en.wikipedia.org/wiki/The_Comedy_of_Errors\">Wikipedia Summary</a>: The Comedy of \
             Errors is one of <b>William Shakespeare's</b> early plays. It is his shortest and one of his most \
             farcical comedies, with a major part of the humour coming from slapstick and mistaken identity, in \
             addition to puns and word play.",
    })
}

/// The index with the link to the product.
pub fn index() -> String {
    document("<h1>Bookinfo</h1>\n<p><a href=\"/productpage\">The Comedy of Errors</a></p>\n")
}

/// The product page; details and reviews each with the status of their call.
pub fn product(user: Option<&str>, details: &(StatusCode, Value), reviews: &(StatusCode, Value)) -> String {
    let session = match user {
        Some(user) => format!("<p>{} <a href=\"logout\">Sign out</a></p>\n", escape(user)),
        None => "<form method=\"post\" action=\"login\"><input name=\"username\" required> \
                 <input name=\"passwd\" type=\"password\"> <button>Sign in</button></form>\n"
            .to_owned(),
    };
    let book = book();
    let description = book["descriptionHtml"].as_str().unwrap_or_default();
    let body = format!(
        "{session}<h1>{}</h1>\n<p>{description}</p>\n{}{}",
        text(&book["title"]),
        details_section(details),
        reviews_section(reviews)
    );
    document(&body)
}

fn document(body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <title>Simple Bookstore App</title>\n\
         <style>.text-black-500{{color:#111}} .text-red-500{{color:#c22}}</style>\n\
         </head>\n<body>\n{body}</body>\n</html>\n"
    )
}

fn details_section((status, details): &(StatusCode, Value)) -> String {
    if *status != StatusCode::OK {
        return failed("Error fetching product details", details);
    }
    let rows = ["ISBN-10", "publisher", "pages", "type", "language"]
        .map(|field| format!("<tr><th>{field}</th><td>{}</td></tr>\n", text(&details[field])));
    format!("<h4>Book Details</h4>\n<table>\n{}</table>\n", rows.concat())
}

fn reviews_section((status, reviews): &(StatusCode, Value)) -> String {
    if *status != StatusCode::OK {
        return failed("Error fetching product reviews", reviews);
    }
    let served_by = text(&reviews["podname"]);
    let cluster = match reviews["clustername"].as_str() {
        None | Some("null") => String::new(),
        Some(cluster) => format!(" on cluster {}", escape(cluster)),
    };
    let sections = reviews["reviews"].as_array().into_iter().flatten().map(|review| {
        format!(
            "<section>\n{}<blockquote>{}</blockquote>\n<div>{}</div>\n\
             <div>Reviews served by: {served_by}{cluster}</div>\n</section>\n",
            rating(&review["rating"]),
            text(&review["text"]),
            text(&review["reviewer"]),
        )
    });
    format!("<h4>Book Reviews</h4>\n{}", sections.collect::<String>())
}

fn rating(rating: &Value) -> String {
    if let Some(stars) = rating["stars"].as_u64() {
        let full = usize::try_from(stars.min(5)).unwrap_or_default();
        let stars = "<span id=\"glyphicon glyphicon-star\">★</span>".repeat(full) + &"☆".repeat(5 - full);
        return format!("<div class=\"flex gap-x-1 text-{}-500\">{stars}</div>\n", text(&rating["color"]));
    }
    match rating.get("error") {
        Some(error) => format!("<p class=\"text-red-500\">{}</p>\n", text(error)),
        None => String::new(),
    }
}

fn failed(title: &str, value: &Value) -> String {
    format!("<p class=\"text-2xl text-red-500\">{title}</p>\n<p>{}</p>\n", text(&value["error"]))
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => escape(text),
        Value::Null => String::new(),
        other => escape(&other.to_string()),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
