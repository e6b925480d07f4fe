"""Elements of HTML and SVG."""

from esper.observability.markup import Markup, element, join

HOSTILE = "<script>alert('x')</script> & \"quoted\""


def test_text_is_escaped():
    """A child that is not markup cannot open an element."""
    assert element("p", HOSTILE).count("<") == 2


def test_attributes_are_escaped():
    """An attribute cannot end its own quotes."""
    assert element("p", title='" onload="x') == '<p title="&quot; onload=&quot;x"></p>'


def test_markup_is_not_escaped_twice():
    """An element inside an element stays one, whatever joined them."""
    inner = element("b", "a & b")
    assert element("p", join(inner, "<")) == "<p><b>a &amp; b</b>&lt;</p>"
    assert isinstance(join(inner), Markup)


def test_names_of_attributes_are_those_of_html():
    """Underscores are hyphens, a trailing one is dropped, viewBox keeps its capital."""
    shown = element("svg", class_="a", view_box="0 0 1 1", aria_label="b", role=None)
    assert shown == '<svg class="a" viewBox="0 0 1 1" aria-label="b"></svg>'


def test_void_elements_have_no_end():
    """A meta element has no closing tag, and numbers are written without needless zeros."""
    assert element("meta", name="a") == '<meta name="a">'
    assert element("rect", x=1.5, y=2.0) == '<rect x="1.5" y="2"></rect>'
