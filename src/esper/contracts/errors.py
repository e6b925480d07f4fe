"""Every error that Esper raises on purpose.

The class decides the policy: whether an operation is retried, whether a breaker counts it,
whether an artifact is quarantined. Nobody reads message text to find out.

    EsperError
    ├── BlueprintError                  a blueprint breaks a rule; permanent
    ├── GrowthError                     a growth run cannot be set up or continued
    ├── RankFailedError                 another rank failed, so that this one does not go on
    ├── TagMovedError                   a tag is not where its mover has seen it; look again
    ├── JobLostError                    a job is another worker's by now; drop what was done
    ├── SiteDescriptionError            no kernel can be offered at a layer; also a ValueError
    ├── CircuitOpenError                an endpoint has been failing and is not asked; transient
    ├── DeadlineExceededError           the time that was given is over; also a TimeoutError
    └── KasminaException                everything of the execution engine
        ├── KernelCompilationError      a valid blueprint could not be lowered
        ├── KernelLoadError             a kernel could not be brought to a seed
        │   ├── KernelNotFoundError     the source answered: no such kernel; permanent
        │   ├── KernelCorruptError      the bytes are not what their name says; permanent, alarming
        │   ├── KernelRefusedError      the kernel failed a check of the probe; permanent
        │   └── KernelSourceUnavailable the source did not answer; transient
        │       ├── KernelSourceSuspended   it was not asked, because it has been failing
        │       └── KernelSourceRefused     it answered, and will answer so again; permanent
        ├── KernelExecutionError        a kernel failed where nothing stands in for it
        ├── SeedLifecycleError          a transition that the table does not allow
        ├── CacheError                  the cache was used against its rules
        ├── AsyncExecutionError         asynchronous execution failed
        └── GradientSyncError           gradients of a side stream failed
"""

from __future__ import annotations

import functools


class EsperError(Exception):
    """Base of everything that Esper raises on purpose."""


class BlueprintError(EsperError):
    """A blueprint breaks a rule. The message names the node and says what to change."""


class GrowthError(EsperError):
    """A growth run cannot be set up or continued as asked."""


class RankFailedError(EsperError):
    """Another rank could not do what all ranks do together, so none does. It says which, and why.

    On the rank that failed its own error is raised.
    """


class SiteDescriptionError(EsperError, ValueError):
    """A layer does what no kernel of the catalog can be told to do, so none is offered there."""


class TagMovedError(EsperError):
    """A tag is not where its mover has seen it: somebody else was faster. Nothing was moved.

    Attributes:
        found: Digest that it points to; None where there is no such tag.
    """

    def __init__(self, message: str, *, found: str | None) -> None:
        super().__init__(message)
        self.found = found

    def __reduce__(self) -> tuple[object, ...]:
        make = functools.partial(type(self), found=self.found)
        return make, self.args, self.__dict__


class JobLostError(EsperError):
    """A job is not this worker's any more, or not at this attempt. Nothing was changed."""


class CircuitOpenError(EsperError):
    """An endpoint has been failing, so it was not asked. Transient, and not to be retried at once.

    Attributes:
        name: The endpoint.
        retry_after_s: Seconds until it may be asked again; 0 where others are probing it now.
    """

    def __init__(self, name: str, retry_after_s: float) -> None:
        super().__init__(name, retry_after_s)
        self.name = name
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        when = f"in {self.retry_after_s:.3g} s" if self.retry_after_s > 0 else "when probed"
        return f"{self.name} has been failing and is not asked for now; it may be again {when}"


class BusUnavailableError(EsperError):
    """The server that events go to does not answer, or refuses to.

    Attributes:
        may_pass: Whether it may answer if it is asked again.
    """

    def __init__(self, message: str, *, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass

    def __reduce__(self) -> tuple[object, ...]:
        make = functools.partial(type(self), may_pass=self.may_pass)
        return make, self.args, self.__dict__


class DeadlineExceededError(EsperError, TimeoutError):
    """The time that was given for something is over."""


class KasminaException(EsperError):  # noqa: N818 - the specification's name
    """Base of the execution engine's errors."""


class KernelCompilationError(KasminaException):
    """A blueprint that is valid could not be made into a kernel."""


class KernelLoadError(KasminaException):
    """A kernel could not be brought to a seed. The seed keeps what it had."""


class KernelNotFoundError(KernelLoadError):
    """The source answered that it has no such kernel. Permanent: retrying changes nothing."""


class KernelCorruptError(KernelLoadError):
    """Bytes are not what their name or format promises. Permanent, and worth an alarm."""


class KernelRefusedError(KernelLoadError):
    """A kernel failed a check before activation. Permanent for this kernel at this site.

    Attributes:
        check: Short name of the check that failed, for example ``"identity"`` or ``"shape"``.
    """

    def __init__(self, message: str, *, check: str) -> None:
        super().__init__(message)
        self.check = check

    def __reduce__(self) -> tuple[object, ...]:
        make = functools.partial(type(self), check=self.check)
        return make, self.args, self.__dict__


class KernelSourceUnavailable(KernelLoadError):  # noqa: N818 - the design's name
    """The source did not answer, or there is none. Transient: a later try may succeed."""


class KernelSourceUnreadable(KernelSourceUnavailable):
    """Something that is no registry answered, as a proxy's page does. Not to be asked again now.

    What was kept of the source still counts.
    """


class KernelSourceSuspended(KernelSourceUnavailable):
    """The source has been failing, so it was not asked. Not to be retried at once.

    Attributes:
        retry_after_s: Seconds until it may be asked, where it has said so itself; None elsewhere.
    """

    retry_after_s: float | None = None


class KernelSourceRefused(KernelSourceUnavailable):
    """The source answered that it does not give the kernel. Permanent until somebody acts on it."""


class KernelExecutionError(KasminaException):
    """A kernel failed where nothing stands in for it.

    An unfolded fossil keeps failing, or a kernel was executed by itself. The message says on what.
    """


class SeedLifecycleError(KasminaException):
    """A transition that the lifecycle table does not allow. The state is unchanged."""


class CacheError(KasminaException):
    """The kernel cache was used against its rules."""


class AsyncExecutionError(KasminaException):
    """Execution on a side stream failed."""


class GradientSyncError(KasminaException):
    """Gradients of a side stream could not be waited for."""
